"""Untrusted files by a fuzzer that sees which lines each input reaches: Atheris, if installed.

    pip install atheris
    python tests/helpers/guided.py bin -max_total_time=60

Kinds are those of SEEDS below. It goes on until an input ends in anything but a result or one of
our errors, and takes libFuzzer's flags.
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
OURS = ["fileio", "evaluation.verification", "pickle", "tarfile", "zipfile"]
with atheris.instrument_imports(include=OURS):
    from fileio.record_writer import write_dataset
    from fileio.shards import write_shards
    from tests.fileio import test_fuzz as fuzz
    from tests.fileio.test_guided_fuzz import KINDS
    from tests.helpers.mutants import JPEGS, OTHERS, PNGS, TARS, TIFFS, WEBPS, ZIPS
    from tests.helpers.onnx_files import EXTERNAL_MODEL

SEEDS = {
    "zip": ZIPS,
    "tar": TARS,
    "image": [*JPEGS, *PNGS, *WEBPS, *TIFFS, *OTHERS],
    "train.rec": [],  # those without are written for the occasion
    "train.idx": [],
    "train-00000.npy": [],
    "bin": fuzz.BINS,
    "index.tsv": [fuzz.INDEX],
    "pairs": fuzz.PAIR_FILES,
    "onnx": [EXTERNAL_MODEL],
}
OF_BYTES = {
    "image": fuzz.decode_image,
    "pairs": lambda data: fuzz.parse_pairs(data, fuzz.find_pair_images),
}
OF_FILES = {
    "zip": ("x.zip", fuzz.read_archive),
    "tar": ("x.tar", fuzz.read_archive),
    "bin": ("x.bin", fuzz.read_bin),
    "onnx": ("x.onnx", fuzz.read_onnx),
    "index.tsv": ("index.tsv", lambda path: fuzz.read_index(path.parent)),
    "train.rec": ("train.rec", lambda path: fuzz.read_pack(path.parent)),
    "train.idx": ("train.idx", lambda path: fuzz.read_pack(path.parent)),
    "train-00000.npy": ("train-00000.npy", lambda path: fuzz.read_shards(path.parent)),
}


def target(kind, folder):
    """The function that libFuzzer calls with bytes, and the seeds."""
    if kind in OF_BYTES:
        return OF_BYTES[kind], SEEDS[kind]
    name, read = OF_FILES[kind]
    if kind == "train-00000.npy":
        write_shards(folder, JPEGS, fuzz.np.array([0, 1, 2]), 1)
    elif kind.startswith("train"):
        write_dataset(folder, JPEGS, [0, 1, 2])

    def run(data):
        (folder / name).write_bytes(data)
        read(folder / name)

    return run, SEEDS[kind] or [(folder / name).read_bytes()]


def main():
    """Fuzz one kind."""
    fuzz.cv2.utils.logging.setLogLevel(fuzz.cv2.utils.logging.LOG_LEVEL_SILENT)
    assert sorted(KINDS) == sorted(SEEDS) == sorted({**OF_BYTES, **OF_FILES})
    kind, errors = "".join(sys.argv[1:2]), (fuzz.UserError,)
    if kind not in KINDS:
        sys.exit(f"Name a kind of file: {', '.join(KINDS)}.")
    if kind == "pairs":
        errors = (ValueError,)  # as its reader knows
    with tempfile.TemporaryDirectory() as root:
        folder, corpus = Path(root, "files"), Path(root, "corpus")
        folder.mkdir()
        corpus.mkdir()
        run, seeds = target(kind, folder)
        for number, seed in enumerate(seeds):
            (corpus / str(number)).write_bytes(seed)

        def one_input(data):
            with contextlib.suppress(*errors):
                run(data)

        atheris.Setup([sys.argv[0], *sys.argv[2:], str(corpus)], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
