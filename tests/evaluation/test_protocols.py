"""protocols.py: every protocol against an implementation from its published description."""

import numpy as np
import pytest
from sklearn.model_selection import KFold
from sklearn.preprocessing import normalize

from evaluation import verification
from evaluation.protocols import (
    PROTOCOLS,
    Protocol,
    describe_protocol,
    evaluate_views,
    fuse_views,
    protocol_scores_by_fold,
)
from evaluation.verification import Pairs, contiguous_folds


def synthetic_views(seed, identities=60, noise=1.0, pairs=400, dimensions=16):
    """Views (2, n, d) of faces of identities, and pairs of both kinds in mixed order."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 1, (identities, dimensions))
    identity_of = np.repeat(np.arange(identities), 4)
    faces = centres[identity_of] + rng.normal(0, noise, (len(identity_of), dimensions))
    views = np.stack([faces, faces + rng.normal(0, 0.3, faces.shape)]).astype(np.float32) * 7
    same = rng.random(pairs) < 0.5
    first = rng.integers(0, len(identity_of), pairs)
    second = np.where(same, first // 4 * 4 + (first + 1) % 4, (first + 4 * 7) % len(identity_of))
    names = [f"{identity}/{face}" for face, identity in enumerate(identity_of)]
    return views, Pairs(names, first, second, same, contiguous_folds(pairs))


def insightface_accuracies(view, mirrored, pairs):
    """The routine that InsightFace quotes its numbers by, from its description.

    Embeddings of the face and of its mirror image in float64, added, scaled to unit length; squared
    Euclidean distance; scikit-learn's KFold(10) without shuffling; of the thresholds 0, 0.01 ...
    below 4 the first that is right most often on nine folds; right means distance below threshold.
    """
    summed = normalize(view.astype(np.float64) + mirrored.astype(np.float64))
    distance = np.sum((summed[pairs.first] - summed[pairs.second]) ** 2, axis=1)
    accuracies = []
    for train, test in KFold(10, shuffle=False).split(np.arange(len(distance))):
        most, chosen = -1.0, None
        for threshold in np.arange(0, 4, 0.01):
            right = np.count_nonzero((distance[train] < threshold) == pairs.same[train])
            if right / len(train) > most:
                most, chosen = right / len(train), threshold
        right = np.count_nonzero((distance[test] < chosen) == pairs.same[test])
        accuracies.append(right / len(test))
    return accuracies


def insightface_val(view, mirrored, pairs, far=1e-3):
    """Its VAL at FAR: a threshold interpolated on nine folds, 0 where they do not reach the FAR."""
    summed = normalize(view.astype(np.float64) + mirrored.astype(np.float64))
    distance = np.sum((summed[pairs.first] - summed[pairs.second]) ** 2, axis=1)
    thresholds, shares = np.arange(0, 4, 0.001), []
    for train, test in KFold(10, shuffle=False).split(np.arange(len(distance))):
        impostors = distance[train][~pairs.same[train]]
        rates = np.array([np.mean(impostors < threshold) for threshold in thresholds])
        chosen = 0.0
        if rates.max() >= far:
            after = int(np.argmax(rates >= far))
            share = (far - rates[after - 1]) / (rates[after] - rates[after - 1])
            chosen = thresholds[after - 1] + share * 0.001
        shares.append(np.mean(distance[test][pairs.same[test]] < chosen))
    return np.mean(shares)


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("pairs", [400, 403])
def test_insightfaces_protocol_to_the_last_digit(noise, pairs):
    views, pairs = synthetic_views(int(noise * 10), noise=noise, pairs=pairs)
    _, report, used = evaluate_views(views, pairs, PROTOCOLS["insightface"])
    expected = insightface_accuracies(*views, pairs)
    assert report["fold_accuracies"] == expected
    assert report["accuracy"] == np.mean(expected)
    assert report["standard_deviation"] == np.std(expected)
    assert report["val"] == pytest.approx(insightface_val(*views, pairs), abs=1e-12)
    assert used.folds.tolist() == contiguous_folds(len(pairs.same)).tolist()


def test_insightfaces_folds_are_tenths_whatever_the_pairs_file_says():
    views, pairs = synthetic_views(1)
    other = pairs._replace(folds=np.arange(len(pairs.same)) % 4)
    expected = evaluate_views(views, pairs, PROTOCOLS["insightface"])[1]
    result = evaluate_views(views, other, PROTOCOLS["insightface"])[1]
    assert result["fold_accuracies"] == expected["fold_accuracies"]


def test_the_papers_protocol_is_the_cosine_of_the_face_alone():
    views, pairs = synthetic_views(2)
    _, report, _ = evaluate_views(views, pairs, PROTOCOLS["paper"])
    cosines = verification.pair_scores(views[0], pairs.first, pairs.second)
    expected = verification.verify(cosines, pairs.same, pairs.folds)
    for key in ("accuracy", "standard_error", "best_accuracy", "fold_accuracies"):
        assert report[key] == expected[key]


def test_concatenation_is_the_cosine_of_both_embeddings_end_to_end():
    views, pairs = synthetic_views(3)
    scores, _, _ = evaluate_views(views, pairs, Protocol(fuse="concat"))
    ends = np.concatenate([views[0], views[1]], axis=1)
    np.testing.assert_allclose(
        scores, verification.pair_scores(ends, pairs.first, pairs.second), atol=1e-7
    )
    assert fuse_views(views, Protocol(fuse="concat")).shape == (views.shape[1], 32)


def test_distance_and_cosine_order_the_pairs_alike():
    views, pairs = synthetic_views(4)
    cosine, by_cosine, _ = evaluate_views(views, pairs, Protocol())
    euclidean, by_distance, _ = evaluate_views(views, pairs, Protocol(metric="euclidean"))
    np.testing.assert_allclose(cosine, euclidean, atol=1e-12)
    assert by_cosine["accuracy"] == by_distance["accuracy"]


def test_the_mean_that_is_subtracted_has_not_seen_the_fold():
    views, pairs = synthetic_views(5)
    protocol = Protocol(subtract_mean=True)
    embeddings = fuse_views(views, protocol)
    result = protocol_scores_by_fold(embeddings, pairs, protocol)
    for fold in range(10):
        others = pairs.folds != fold
        both = np.concatenate([embeddings[pairs.first[others]], embeddings[pairs.second[others]]])
        unit = normalize(embeddings - both.mean(0))
        np.testing.assert_allclose(
            result[fold], np.sum(unit[pairs.first] * unit[pairs.second], 1), atol=1e-12
        )
    scores, report, _ = evaluate_views(views, pairs, protocol)
    assert all(scores[i] == result[fold, i] for i, fold in enumerate(pairs.folds))
    right = [
        np.mean((result[k] >= report["fold_thresholds"][k])[pairs.folds == k]
                == pairs.same[pairs.folds == k])
        for k in range(10)
    ]  # fmt: skip
    assert report["fold_accuracies"] == right


def test_best_on_all_is_named_and_never_lower():
    views, pairs = synthetic_views(7)
    protocol = Protocol(threshold="best")
    _, report, _ = evaluate_views(views, pairs, protocol)
    assert report["accuracy"] == pytest.approx(report["best_accuracy"], abs=1e-12)
    assert set(report["fold_thresholds"]) == {report["best_threshold"]}
    assert report["accuracy"] >= evaluate_views(views, pairs, Protocol())[1]["accuracy"]
    assert "best threshold on the test pairs (optimistic)" in describe_protocol(protocol)


def test_every_protocol_reads_differently():
    protocols = [
        *PROTOCOLS.values(),
        Protocol(fuse="concat"),
        Protocol(subtract_mean=True),
        Protocol(metric="euclidean"),
        Protocol(threshold="best"),
    ]
    assert len({describe_protocol(protocol) for protocol in protocols}) == len(protocols)


def test_numbers_that_are_not_finite_are_refused():
    views, pairs = synthetic_views(8)
    views[1, [3, 5]] = np.nan
    with pytest.raises(ValueError, match=r"of 2 of 240 faces are not finite"):
        evaluate_views(views, pairs, Protocol())
    with pytest.raises(ValueError, match="mirror"):
        evaluate_views(views[:1], pairs, Protocol())
