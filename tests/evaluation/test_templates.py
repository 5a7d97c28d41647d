"""templates.py against the definitions, written out image by image and pair by pair."""

import numpy as np
import pytest

from evaluation import templates
from evaluation.templates import build_templates, identify, roc_points, score_templates, tar_at_fars


def made_up(seed, images=300, dimensions=8):
    rng = np.random.default_rng(seed)
    features = rng.normal(0, 1, (images, dimensions)).astype(np.float32)
    features *= rng.uniform(0.5, 20, (images, 1)).astype(np.float32)
    template_of = rng.choice([7, 3, 12, 900, 901, 5], images)
    media_of = rng.integers(0, 9, images)  # the same media ids in every template
    return features, template_of, media_of, rng.uniform(0.2, 1, images)


@pytest.mark.parametrize("unit_length", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("rows", [1, 40, 100_000])
def test_a_template_is_the_sum_of_the_means_of_its_media(monkeypatch, unit_length, weighted, rows):
    monkeypatch.setattr(templates, "IMAGES_PER_BLOCK", rows)
    features, template_of, media_of, scores = made_up(0)
    ids, result = build_templates(
        features, template_of, media_of, scores if weighted else None, unit_length
    )
    assert ids.tolist() == [3, 5, 7, 12, 900, 901]
    for template, embedding in zip(ids, result, strict=True):
        total = np.zeros(8)
        for media in set(media_of[template_of == template]):
            rows_of = [
                features[i].astype(np.float64)
                / (np.linalg.norm(features[i]) if unit_length else 1)
                * (scores[i] if weighted else 1)
                for i in range(300)
                if template_of[i] == template and media_of[i] == media
            ]
            total += np.mean(rows_of, axis=0)
        np.testing.assert_allclose(embedding, total / np.linalg.norm(total), atol=2e-6)


def test_features_may_be_memory_mapped_and_must_be_finite(tmp_path):
    features, template_of, media_of, _ = made_up(1)
    np.save(tmp_path / "f.npy", features)
    mapped = np.load(tmp_path / "f.npy", mmap_mode="r")
    expected = build_templates(features, template_of, media_of)[1]
    np.testing.assert_array_equal(build_templates(mapped, template_of, media_of)[1], expected)
    features[17, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        build_templates(features, template_of, media_of)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_pairs_are_scored_in_chunks(monkeypatch, chunk):
    monkeypatch.setattr(templates, "PAIRS_PER_BLOCK", chunk)
    rng = np.random.default_rng(2)
    embeddings = rng.normal(0, 1, (20, 8)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    first, second = rng.integers(0, 20, (2, 500)).astype(np.int32)
    scores = score_templates(embeddings, first, second)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, (embeddings @ embeddings.T)[first, second], atol=1e-6)


@pytest.mark.parametrize("decimals", [1, 2, 6])  # with many ties, with few, with none
def test_tar_at_far_is_the_best_threshold_that_keeps_to_it(decimals):
    rng = np.random.default_rng(3)
    same = rng.random(3000) < 0.2
    scores = (rng.normal(0, 0.2, 3000) + 0.4 * same).round(decimals).astype(np.float32)
    result = tar_at_fars(scores, same, ("1e-1", "1e-2", "1e-3", "1e-6"))
    for far, point in result.items():
        best = max(
            np.mean(scores[same] >= threshold)
            for threshold in [*np.unique(scores), 9]
            if np.mean(scores[~same] >= threshold) <= float(far)
        )
        assert point["tar"] == best
        assert np.mean(scores[~same] > point["threshold"]) <= float(far)
    fars, tars = roc_points(scores, same, 50)
    assert (np.diff(tars) >= 0).all()
    assert (
        tars[20] == tar_at_fars(scores, same, [repr(float(fars[20]))])[repr(float(fars[20]))]["tar"]
    )
    with pytest.raises(ValueError, match="one kind"):
        tar_at_fars(scores[same], same[same])


def naive_identification(similarity, probe_subjects, gallery_subjects):
    """Ranks, mates' scores and false alarms, one probe at a time."""
    ranks, mates, alarms = [], [], []
    for row, subject in zip(similarity, probe_subjects, strict=True):
        by_identity = {}
        for score, identity in zip(row, gallery_subjects, strict=True):
            by_identity[identity] = max(score, by_identity.get(identity, -9))
        mate = by_identity.pop(subject, None)
        if mate is None:
            alarms.append(max(by_identity.values()))
        else:
            mates.append(mate)
            ranks.append(1 + sum(score >= mate for score in by_identity.values()))
    return np.array(ranks), np.array(mates), np.array(alarms)


@pytest.mark.parametrize("seed", range(4))
def test_identification_is_a_search_of_one_probe_at_a_time(seed):
    rng = np.random.default_rng(seed)
    gallery_subjects = rng.integers(0, 30, 45)  # some with several templates, some missing
    probe_subjects = rng.integers(0, 40, 400)
    centres = rng.normal(0, 1, (40, 6))
    gallery, probes = (
        (centres[s] + rng.normal(0, 0.9, (len(s), 6))).astype(np.float32)
        for s in (gallery_subjects, probe_subjects)
    )
    result = identify(probes, probe_subjects, gallery, gallery_subjects, ("0.1", "0.01", "0.5"))
    ranks, mates, alarms = naive_identification(
        probes @ gallery.T, probe_subjects, gallery_subjects
    )
    assert (result["rank1"], result["rank5"]) == (np.mean(ranks == 1), np.mean(ranks <= 5))
    assert (result["mated"], result["others"], result["best_non_mates"]) == (
        len(mates),
        len(alarms),
        False,
    )
    for fpir, rate in result["tpir"].items():
        thresholds = [t for t in np.append(alarms, 99) if np.mean(alarms > t) <= float(fpir)]
        assert rate == pytest.approx(max(np.mean(mates > t) for t in thresholds))


def test_without_other_probes_the_best_non_mates_count():
    gallery = np.eye(3, dtype=np.float32)
    probes = np.array([[1, 0.2, 0], [0.3, 1, 0], [0, 0.9, 0.1]], np.float32)
    result = identify(probes, np.array([5, 6, 7]), gallery, np.array([5, 6, 7]), ("0.4", "0.01"))
    assert result["best_non_mates"]
    assert (result["rank1"], result["rank5"]) == (2 / 3, 1)
    # Best non-mates: 0.2, 0.3, 0.9. One of three may be exceeded at 0.4, none at 0.01.
    assert result["tpir"] == {"0.4": pytest.approx(2 / 3), "0.01": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="no probe has a mate"):
        identify(probes, np.array([8, 9, 9]), gallery, np.array([5, 6, 7]))


def test_a_tie_counts_against_the_mate():
    gallery = np.array([[1, 0], [1, 0]], np.float32)
    result = identify(gallery[:1], np.array([0]), gallery, np.array([0, 1]))
    assert (result["rank1"], result["rank5"]) == (0, 1)
