import os
import pickle

import numpy as np
import pytest
import torch

from evaluation.embedding_cache import EmbeddingCache, load_embeddings, model_checksum


class Network:
    """An embedding function that counts the faces it was given."""

    def __init__(self):
        self.faces = 0

    def __call__(self, images):
        self.faces += len(images)
        return images.float().mean(1).flatten(1)[:, :6] + 1


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 112, 112, 3), dtype=torch.uint8)


def test_what_was_embedded_is_not_embedded_again(tmp_path, images):
    network = Network()
    first = EmbeddingCache(tmp_path / "new", "best", "a").views(network, "lfw", images, flip=False)
    assert (first.shape, network.faces) == ((1, 5, 6), 5)
    cache = EmbeddingCache(tmp_path / "new", "best", "a")
    both = cache.views(network, "lfw", images, flip=True)
    assert (both.shape, network.faces, cache.computed) == ((2, 5, 6), 10, 5)
    np.testing.assert_array_equal(both[0], first[0])
    np.testing.assert_array_equal(both[1], network(images.flip(2)).numpy())
    assert (
        EmbeddingCache(tmp_path / "new", "best", "a")
        .views(network, "lfw", images, flip=True)
        .tolist()
        == both.tolist()
    )
    assert network.faces == 15


@pytest.mark.parametrize("changed", ["model", "one pixel", "order"])
def test_another_model_or_face_is_embedded(tmp_path, images, changed):
    network = Network()
    EmbeddingCache(tmp_path, "best", "a").views(network, "lfw", images, flip=False)
    other = images.clone()
    if changed == "one pixel":
        other[2, 50, 50, 1] ^= 1
    if changed == "order":
        other = images.flip(0)
    checksum = "b" if changed == "model" else "a"
    result = EmbeddingCache(tmp_path, "best", checksum).views(network, "lfw", other, flip=False)
    np.testing.assert_array_equal(result[0], network(other).numpy())
    assert network.faces == 15
    assert len(list(tmp_path.iterdir())) == 1  # the old file has gone


def damage(path, how, embeddings):
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[len(data) // 2 :]
    elif how == "bit":
        data[data.index(embeddings.tobytes()) + 9] ^= 4
    elif how == "empty":
        data.clear()
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "bit", "empty", "nan", "shape", "pickle", "objects"])
def test_a_corrupt_file_gets_a_sentence_and_is_written_again(tmp_path, images, capsys, how):
    network, marker = Network(), tmp_path / "unpickled"
    cache = EmbeddingCache(tmp_path, "best", "a")
    expected = cache.views(network, "lfw", images, flip=False)
    path = tmp_path / "lfw-best.npz"
    with np.load(path) as stored:
        content = dict(stored)

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    if how == "nan":
        content["embeddings"][1, 2] = np.nan
        np.savez(path, **content)
    elif how == "shape":
        np.savez(path, key=content["key"], embeddings=content["embeddings"][:3])
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif how == "objects":
        np.savez(path, key=content["key"], embeddings=np.array([Bomb()] * 5, dtype=object))
    else:
        damage(path, how, expected)
    result = cache.views(network, "lfw", images, flip=False)
    np.testing.assert_array_equal(result, expected)
    said = capsys.readouterr().out
    assert "lfw-best.npz is corrupt" in said
    assert said.count("\n") == 1
    assert not marker.exists()
    cache.views(network, "lfw", images, flip=False)
    assert (capsys.readouterr().out, network.faces) == ("", 10)


def test_no_damage_at_any_byte_is_taken_for_an_embedding(tmp_path, images):
    path = tmp_path / "lfw-best.npz"
    cache = EmbeddingCache(tmp_path, "best", "a")
    expected = cache.views(Network(), "lfw", images, flip=False)[0]
    with np.load(path) as stored:
        key = str(stored["key"])
    complete = path.read_bytes()
    for index in range(0, len(complete), 3):
        path.write_bytes(complete[:index] + bytes([complete[index] ^ 0x55]) + complete[index + 1 :])
        result = load_embeddings(path, key, 5)
        assert result is None or np.array_equal(result, expected)


def test_a_models_checksum_covers_file_and_settings(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    one = model_checksum(path, (0.5, 0.5))
    assert model_checksum(path, (0.5, 0.5)) == one
    assert model_checksum(path, (0.4, 0.5)) != one
    path.write_bytes(b"weighty")
    assert model_checksum(path, (0.5, 0.5)) != one
