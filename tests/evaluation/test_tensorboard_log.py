"""The TensorBoard log of an evaluation, read back with TensorBoard's own reader."""

import cv2
import numpy as np
from google.protobuf import text_format
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import SummaryWriter

from evaluation.tensorboard_log import PROJECTED, SPRITE, log_evaluation, log_projector, pair_grid
from tests.evaluation.test_report import make_result
from tests.helpers.tiny import hostile_names
from training.event_log import truncate_events


def read(folder):
    shown = EventAccumulator(str(folder), {"tensors": 0, "images": 0, "scalars": 0})
    shown.Reload()
    return shown


def test_all_of_an_evaluation_is_logged_under_lfw(tmp_path):
    result = make_result(tmp_path)
    with SummaryWriter(tmp_path) as writer:
        for step in (3, 6):
            log_evaluation(writer, result, step)
    shown = read(tmp_path)
    tags = shown.Tags()
    assert set(tags["scalars"]) == {"lfw/accuracy", "lfw/threshold"}  # 24 pairs support no FAR
    assert set(tags["images"]) == {"lfw/roc", "lfw/false_positives", "lfw/false_negatives"}
    assert tags["tensors"] == ["lfw/pr"]
    assert [event.step for event in shown.Scalars("lfw/accuracy")] == [3, 6]
    assert shown.Scalars("lfw/accuracy")[0].value == np.float32(result.metrics["accuracy"])
    image = cv2.imdecode(np.frombuffer(shown.Images("lfw/roc")[0].encoded_image_string, "u1"), 1)
    assert image.shape[0] > 400
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50
    # The curve's row 0 are true positives at thresholds from 0 to 1; at 0 all pairs are accepted.
    curve = make_ndarray(shown.Tensors("lfw/pr")[0].tensor_proto)
    same = result.test_set.pairs.same
    assert (curve[0, 0], curve[1, 0]) == (same.sum(), (~same).sum())
    middle = curve.shape[1] // 2  # a cosine of 0
    assert abs(curve[0, middle] - (result.scores[same] >= 0).sum()) <= 1


def test_a_tar_is_logged_if_the_pairs_support_its_far(tmp_path):
    result = make_result(tmp_path)
    result.metrics["tar_at_far"] = {"1e-1": 0.75, "1e-2": 0.5}
    with SummaryWriter(tmp_path) as writer:
        log_evaluation(writer, result, 1)
    assert "lfw/tar_at_far_1e-1" in read(tmp_path).Tags()["scalars"]
    assert "lfw/tar_at_far_1e-2" not in read(tmp_path).Tags()["scalars"]


def test_an_open_epochs_evaluation_is_removed_completely(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("train/loss", 1.0, 4)
        log_evaluation(writer, make_result(tmp_path), 4)
    truncate_events(tmp_path, 4, epoch_is_open=True)
    shown = read(tmp_path)
    tags = shown.Tags()
    assert (tags["scalars"], tags["images"], tags["tensors"]) == (["train/loss"], [], [])


def test_the_hardest_pairs_are_side_by_side(tmp_path):
    result = make_result(tmp_path)
    pairs, images = result.test_set.pairs, result.test_set.images.numpy()
    grid = pair_grid(result, np.arange(5))
    assert grid.shape == (2 * 142, 4 * 236, 3)
    assert (grid[4:116, 4:116] == images[pairs.first[0]]).all()
    assert (grid[4:116, 118:230] == images[pairs.second[0]]).all()
    assert (grid[146:258, 4:116] == images[pairs.first[4]]).all()


def test_the_projector_has_an_image_and_a_name_for_each_face(tmp_path):
    names = hostile_names(48)
    names[5] = "tab\there\nand there/5"
    result = make_result(tmp_path, names)
    with SummaryWriter(tmp_path) as writer:
        log_projector(writer, result, 7)
    config = text_format.Parse((tmp_path / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (entry,) = config.embeddings
    rows = (tmp_path / entry.metadata_path).read_text("utf-8").splitlines()
    assert rows[0].split("\t") == ["identity", "image"]
    assert len(rows) == 49
    assert all(row.count("\t") == 1 for row in rows)
    vectors = np.loadtxt(tmp_path / entry.tensor_path, delimiter="\t")
    order = [int(row.rpartition("/")[2]) for row in rows[1:]]
    np.testing.assert_allclose(vectors, result.embeddings[order], atol=1e-6)
    sprite = cv2.imread(str(tmp_path / entry.sprite.image_path))[..., ::-1]
    assert list(entry.sprite.single_image_dim) == [SPRITE, SPRITE]
    face = result.test_set.images[order[8]].numpy()  # row 1, column 1 of 7 x 7
    small = cv2.resize(face, (SPRITE, SPRITE), interpolation=cv2.INTER_AREA)
    actual = sprite[SPRITE : 2 * SPRITE, SPRITE : 2 * SPRITE]
    np.testing.assert_allclose(actual, small, atol=2)


def test_no_more_than_a_thousand_faces_are_projected(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.tensorboard_log.PROJECTED", 10)
    assert PROJECTED == 1000
    with SummaryWriter(tmp_path) as writer:
        log_projector(writer, make_result(tmp_path), 7)
    (rows,) = tmp_path.glob("00007/*/tensors.tsv")
    assert len(rows.read_text().splitlines()) == 10
