"""ijb_files.py: the metadata of a small benchmark, complete, corrupt and missing."""

import numpy as np
import pytest

from evaluation.ijb_files import read_ijb, read_template_pairs, read_template_subjects
from tests.helpers.ijb_benchmark import IMAGES, SHIFT
from utils import TEMPLATE, UserError


def test_metadata_is_read_in_the_order_of_the_images(ijb_folder):
    ijb = read_ijb(ijb_folder)
    assert (ijb.name, ijb.files[:2], len(ijb.files)) == ("ijbc", ["1.jpg", "2.jpg"], IMAGES)
    np.testing.assert_allclose(ijb.points[4], TEMPLATE + SHIFT, atol=1e-3)
    assert ijb.detector_scores[7] == pytest.approx(0.907)
    assert (ijb.template_of[[0, 6]].tolist(), ijb.media_of[7]) == ([10, 100], 2)
    ids = np.unique(ijb.template_of)
    first, second, same = read_template_pairs(ijb, ids)
    assert ids[first[:7]].tolist() == [10] * 6 + [11]
    assert ids[second[:7]].tolist() == [100, 101, 102, 103, 104, 105, 100]
    assert np.flatnonzero(same).tolist() == [0, 7, 14, 21, 28, 35]
    index, subjects = read_template_subjects(ijb.meta / "ijbc_1N_probe_mixed.csv", ids)
    assert (ids[index].tolist(), subjects.tolist()) == (list(range(100, 106)), list(range(6)))


@pytest.mark.parametrize("block", [1, 10, 1 << 24])
@pytest.mark.parametrize("newline", ["\n", ""])
def test_pairs_are_read_in_blocks_of_any_size(ijb_folder, edit_ijb, monkeypatch, block, newline):
    expected = read_template_pairs(read_ijb(ijb_folder), np.r_[10:16, 100:106])
    monkeypatch.setattr("evaluation.ijb_files.READ_BYTES", block)
    folder = edit_ijb("ijbc_template_pair_label.txt", "15 105 1\n", f"15 105 1{newline}")
    result = read_template_pairs(read_ijb(folder), np.r_[10:16, 100:106])
    for column, wanted in zip(result, expected, strict=True):
        assert (column == wanted).all()


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("face_tid_mid.txt", "5.jpg 14 1", "5.jpg 14", "not lines of a name and 2 numbers"),
        ("face_tid_mid.txt", "5.jpg 14 1", "5.jpg x 1", "not lines of a name and 2 numbers"),
        ("face_tid_mid.txt", "5.jpg", "55.jpg", "they differ from line 5 on"),
        ("face_tid_mid.txt", "5.jpg", "../../5.jpg", "'../../5.jpg', which is not in loose_crop/"),
        ("face_tid_mid.txt", "5.jpg", "/etc/5.jpg", "which is not in loose_crop/"),
        ("name_5pts_score.txt", "1.jpg ", "1.jpg nan ", "not lines of a name and 11 numbers"),
        ("template_pair_label.txt", "10 101 0", "10 101", "is not lines 'template template 0/1'"),
        ("template_pair_label.txt", "10 101 0", "10 101 2", "is not lines 'template template 0/1'"),
        ("template_pair_label.txt", "10 101 0", "ten 101 0", "is not lines 'template"),
        ("template_pair_label.txt", "10 101 0", "10 777 0", "Line 2 of .* names template 777"),
        ("1N_probe_mixed.csv", "103,3,", "103;3;", "is not lines 'template,subject"),
        ("1N_probe_mixed.csv", "103,3,", "103,4,", "one subject each"),
        ("1N_probe_mixed.csv", "103,3,", "555,3,", "names 1 templates without an image, e.g. 555"),
    ],
)
def test_corrupt_metadata_gets_a_sentence(edit_ijb, file, old, new, complaint):
    folder = edit_ijb(f"ijbc_{file}", old, new)
    with pytest.raises(UserError, match=complaint) as raised:
        ijb = read_ijb(folder)
        ids = np.unique(ijb.template_of)
        read_template_pairs(ijb, ids)
        read_template_subjects(ijb.meta / "ijbc_1N_probe_mixed.csv", ids)
    assert f"ijbc_{file}" in str(raised.value)


@pytest.mark.parametrize(
    "file", ["face_tid_mid.txt", "name_5pts_score.txt", "template_pair_label.txt"]
)
def test_missing_and_empty_metadata_get_a_sentence(edit_ijb, file):
    folder = edit_ijb("ijbc_face_tid_mid.txt", "", "")
    path = folder / "meta" / f"ijbc_{file}"
    for action in (lambda: path.write_text(""), path.unlink):
        action()
        with pytest.raises(UserError, match=file):
            ijb = read_ijb(folder)
            read_template_pairs(ijb, np.unique(ijb.template_of))
