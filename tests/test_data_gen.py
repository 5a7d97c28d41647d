import numpy as np
import pytest
import torch

import data_gen
from data_gen import ImageStore, make_split, normalise, train_batches, valid_batches
from fileio.images import encode_jpeg
from fileio.record_writer import write_dataset
from fileio.recordio import RecordReader
from training.augment import build_augmentation

GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 identities of 5 images; an image's colour tells its number."""
    folder = tmp_path_factory.mktemp("set")
    write_dataset(folder, [encode_jpeg(face(i)) for i in range(60)], [i // 5 for i in range(60)])
    return folder


def face(number):
    image = np.full((112, 112, 3), number * 4, np.uint8)
    image[:, :56, 0] = 255 - number * 4  # the left half differs, so that mirroring shows
    return image


def store_of(folder, cache="ram", **options):
    reader = RecordReader(folder)
    faces = make_split(reader.labels, valid_fraction=0.2, seed=0, **options)
    return ImageStore(reader, faces, torch.device("cpu"), cache=cache, workers=2), faces


def number_of(images):
    """Which image each of (n, 3, 112, 112) images in [-1, 1] is, by its green channel."""
    return ((images[:, 1].mean((1, 2)) * 127.5 + 127.5) / 4).round().long()


def test_the_example_at_the_top_of_the_module_runs(folder):
    example = [line[4:] for line in data_gen.__doc__.splitlines() if line.startswith("    ")]
    assert len(example) == 5
    code = "\n".join(example).replace("data/faces_webface_112x112", str(folder))
    code = code.replace("batch_size=512", "batch_size=16")
    names = vars(data_gen) | {"seen": []}
    exec(code + "\n    seen.append((batch.images.shape, batch.labels.shape))", names)
    assert names["seen"] == [((16, 3, 112, 112), (16,))] * 3


@pytest.mark.parametrize("cache", ["ram", "none", "auto", "gpu"])
def test_batches_hold_the_right_images_and_labels(folder, cache):
    store, faces = store_of(folder, cache)
    seen = []
    for batch in train_batches(store, faces.train, batch_size=8, seed=0, epoch=0):
        assert batch.images.shape == (8, 3, 112, 112)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == torch.int64
        numbers = number_of(batch.images)
        assert (numbers // 5 == batch.labels).all()
        assert numbers.tolist() == batch.positions.tolist()
        seen += numbers.tolist()
    assert len(seen) == len(set(seen)) == 48
    assert set(seen) == set(faces.train.tolist())


def test_the_order_depends_on_seed_and_epoch_alone(folder):
    store, faces = store_of(folder)

    def order(**options):
        options = {"batch_size": 8, "seed": 0, "epoch": 0} | options
        batches = train_batches(store, faces.train, **options)
        return np.concatenate([batch.positions for batch in batches]).tolist()

    assert order() == order(batch_size=16) == order(batch_size=4)
    assert order() != order(epoch=1)
    assert order() != order(seed=1)
    assert order(first_step=2) == order()[16:]
    complete = list(train_batches(store, faces.train, batch_size=8, seed=0, epoch=3))
    rest = list(train_batches(store, faces.train, batch_size=8, seed=0, epoch=3, first_step=4))
    for expected, batch in zip(complete[4:], rest, strict=True):
        assert torch.equal(expected.images, batch.images)  # mirrored in the same way, too


def test_flips_mirror_about_half_of_the_images(folder):
    store, faces = store_of(folder)
    mirrored = []
    for epoch in range(4):
        for batch in train_batches(store, faces.train, batch_size=8, seed=0, epoch=epoch):
            straight = normalise(store.fetch(batch.positions))
            same = (batch.images == straight).flatten(1).all(1)
            turned = (batch.images == straight.flip(3)).flatten(1).all(1)
            assert (same ^ turned).all()
            mirrored += turned.tolist()
    assert 0.35 < np.mean(mirrored) < 0.65
    for batch in train_batches(store, faces.train, batch_size=8, seed=0, epoch=0, flip=False):
        assert torch.equal(batch.images, normalise(store.fetch(batch.positions)))


def test_validation_covers_every_image_once_and_unmirrored(folder):
    store, faces = store_of(folder)
    batches = list(valid_batches(store, faces.valid, batch_size=5))
    assert [len(b.labels) for b in batches] == [5, 5, 2]
    assert torch.cat([number_of(b.images) for b in batches]).tolist() == faces.valid.tolist()


def test_normalise_is_exact():
    image = torch.arange(256, dtype=torch.uint8).repeat(147).reshape(1, 112, 112, 3)
    expected = (image.permute(0, 3, 1, 2).double() - 127.5) / 127.5
    assert torch.equal(normalise(image), expected.float())


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_chosen_images_come_as_their_mirror_images(folder, cache):
    store, _ = store_of(folder, cache)
    positions = np.arange(59)[::-1].copy()  # not in order, nor a multiple of a thread's chunk
    straight = store.fetch(positions)
    assert straight.flatten(1).float().std(1).min() > 0  # the halves differ, so mirroring shows
    chosen = np.arange(59) % 3 == 0
    fetched = store.fetch(positions, chosen)
    assert torch.equal(fetched[~chosen], straight[~chosen])
    assert torch.equal(fetched[chosen], straight[chosen].flip(2))
    assert torch.equal(store.fetch(positions), straight)  # the cache itself stayed as it was


# ------------------------------------------------------------------------------ the split


def test_split_is_by_image_within_identities():
    labels = np.repeat(np.arange(200), np.arange(200) % 13 + 1)
    faces = make_split(labels, valid_fraction=0.1, seed=0)
    both = np.concatenate([faces.train, faces.valid])
    assert np.array_equal(np.sort(both), np.arange(len(labels)))
    assert set(faces.labels[faces.train]) == set(range(200))  # everybody keeps an image
    assert len(faces.valid) == pytest.approx(0.1 * len(labels), rel=0.15)
    again = make_split(labels, valid_fraction=0.1, seed=0)
    assert np.array_equal(again.valid, faces.valid)
    assert not np.array_equal(make_split(labels, valid_fraction=0.1, seed=1).valid, faces.valid)
    assert len(make_split(labels, valid_fraction=0, seed=0).valid) == 0


def test_max_classes_keeps_the_largest_and_renumbers_them():
    labels = np.array([0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 5])
    faces = make_split(labels, valid_fraction=0, max_classes=2)
    assert faces.num_classes == 2
    assert labels[faces.indices].tolist() == [1, 1, 1, 3, 3, 3, 3]
    assert faces.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    everyone = make_split(labels, valid_fraction=0)
    assert everyone.num_classes == 5  # nobody has label 4: no class without images
    assert everyone.labels.max() == 4


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_augmented_batches_begin_anywhere_and_validation_stays_clean(folder, cache):
    store, faces = store_of(folder, cache)
    change = build_augmentation("adaface", seed=0, epoch=3)
    options = {"batch_size": 8, "seed": 0, "epoch": 3, "augment": change}
    complete = list(train_batches(store, faces.train, **options))
    rest = list(train_batches(store, faces.train, **options, first_step=4))
    for batch, again in zip(complete[4:], rest, strict=True):
        assert torch.equal(batch.images, again.images)
    plain = list(train_batches(store, faces.train, **options | {"augment": None}))
    changed = [
        not torch.equal(image, same)
        for batch, other in zip(complete, plain, strict=True)
        for image, same in zip(batch.images, other.images, strict=True)
    ]
    assert 0.2 < np.mean(changed) < 0.8
    for batch in valid_batches(store, faces.valid, batch_size=8):
        assert torch.equal(batch.images, normalise(store.fetch(batch.positions)))


# ------------------------------------------------------------------------------ bad images


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_images_that_cannot_be_decoded_are_left_out_and_named(tmp_path, cache):
    jpegs = [encode_jpeg(face(i)) for i in range(12)]
    jpegs[3] = jpegs[3][:40]
    write_dataset(tmp_path, jpegs, [i // 3 for i in range(12)])
    reader = RecordReader(tmp_path)
    faces = make_split(reader.labels, valid_fraction=0)
    store = ImageStore(reader, faces, torch.device("cpu"), cache=cache, workers=2)
    positions = store.readable(faces.train)
    batches = list(train_batches(store, positions, batch_size=len(positions), seed=0, epoch=0))
    assert 3 not in batches[0].positions
    assert len(batches[0].images) == len(batches[0].labels) == 11
    assert list(store.corrupt) == [3]
    assert "Record 4 of" in store.corrupt[3]  # ids of records begin at 1
    assert store.record_ids(np.array([0, 3])) == [1, 4]


def test_cache_goes_where_the_images_fit(monkeypatch):
    monkeypatch.setattr(data_gen, "available_memory", lambda: 10 * data_gen.FACE_BYTES)
    assert data_gen.choose_cache(5, torch.device("cpu")) == "ram"
    assert data_gen.choose_cache(9, torch.device("cpu")) == "none"
    assert data_gen.choose_cache(5, GPU, gpu_room=6 * data_gen.FACE_BYTES) == "gpu"
    assert data_gen.choose_cache(5, GPU, gpu_room=4 * data_gen.FACE_BYTES) == "ram"
    # By default half of the GPU's memory stays free.
    memory = (11 * data_gen.FACE_BYTES, 80 << 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: memory)
    assert [data_gen.choose_cache(count, GPU) for count in (5, 6)] == ["gpu", "ram"]


def test_a_cache_that_memory_does_not_suffice_for_is_left_out(tmp_path, monkeypatch, capsys):
    write_dataset(tmp_path, [encode_jpeg(face(i)) for i in range(6)], [i // 3 for i in range(6)])
    reader = RecordReader(tmp_path)
    faces = make_split(reader.labels, valid_fraction=0)

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(data_gen, "load_images", full)
    store = ImageStore(reader, faces, torch.device("cpu"), cache="ram", workers=2)
    assert (store.cache, store.images) == ("none", None)
    printed = capsys.readouterr().out
    assert printed == "Memory was full for --cache ram; taking --cache none instead.\n"
    assert len(next(iter(train_batches(store, faces.train, batch_size=6, seed=0, epoch=0))).images)


@pytest.mark.parametrize("short_of", ["nothing", "room", "memory"])
def test_a_cache_that_one_process_has_no_room_for_is_no_ones(groups, tmp_path, short_of):
    """Otherwise corrupt images would change their orders of an epoch in different ways."""
    write_dataset(tmp_path / "set", [encode_jpeg(face(i)) for i in range(4)], [0, 0, 1, 1])
    printed = groups.run(tmp_path, 2, "cache_together", str(tmp_path / "set"), short_of)
    cache = "cache ram, True" if short_of == "nothing" else "cache none, False"
    assert all(cache in text for text in printed), printed


def test_real_records_feed(real_faces):
    reader = RecordReader(real_faces / "faces_mixed_112x112")
    faces = make_split(reader.labels, valid_fraction=0.02, max_classes=20)
    store = ImageStore(reader, faces, torch.device("cpu"))
    batch = next(iter(train_batches(store, faces.train, batch_size=64, seed=0, epoch=0)))
    assert not store.corrupt
    assert 0.2 < batch.images.std() < 0.9
    assert abs(batch.images.mean()) < 0.5
