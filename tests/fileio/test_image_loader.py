import numpy as np
import pytest

from fileio.image_loader import load_images
from fileio.images import encode_jpeg
from fileio.record_writer import write_dataset
from fileio.recordio import RecordError, RecordReader


def test_images_of_another_size_are_an_error(tmp_path):
    write_dataset(tmp_path, [encode_jpeg(np.zeros((96, 96, 3), np.uint8))] * 4, [0, 0, 1, 1])
    (tmp_path / "property").unlink()
    with pytest.raises(RecordError, match=r"96x96.*pre_process"):
        load_images(RecordReader(tmp_path), np.arange(4))
