import pytest

from config import parse_args
from tests.helpers.synthetic_faces import face, image_without_face
from tools import detect_faces


def detect(*argv):
    detect_faces.main(
        parse_args([*map(str, argv), "--device", "cpu"], "detect_faces", detect_faces.Settings)
    )


def test_a_line_per_image_with_box_and_points(tmp_path, capsys):
    (tmp_path / "one.jpg").write_bytes(face(0))
    (tmp_path / "two.jpg").write_bytes(image_without_face())
    detect(tmp_path / "one.jpg", tmp_path / "two.jpg")
    one, two = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert one[:2] == [str(tmp_path / "one.jpg"), "ok"]
    score, left, top, right, bottom, *points = map(float, one[2:])
    assert 0.7 < score <= 1
    assert len(points) == 10
    assert all(left < x < right for x in points[::2])
    assert all(top < y < bottom for y in points[1::2])
    assert two == [str(tmp_path / "two.jpg"), "no_face"]


def test_bad_files_and_no_file_are_messages(tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("no image")
    for argv, text in ([tmp_path / "text.jpg"], "is not an image"), ([], "required: IMAGE"):
        with pytest.raises(SystemExit) as ended:
            detect(*argv)
        assert ended.value.code == 2
        assert text in capsys.readouterr().err
