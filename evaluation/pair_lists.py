"""Lists of pairs as people keep them: LFW's pairs.txt, CALFW's, CSV, one pair per line.

    from evaluation.pair_lists import read_pairs
    pairs, used = read_pairs("data/pairs.txt", open_face_folder("data/faces_lfw_112x112"))

A list does not say how it is to be read: its encoding, what separates its columns, which column is
the label, where its paths begin. So it is read in each way (ENCODINGS x SEPARATORS x LAYOUTS), and
right is the first in which every line is a pair and every path an image of the folder. Where there
is none, the error is about the way that gets furthest.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.face_folders import IMAGE_SUFFIX, FaceFolder, image_name, image_path
from evaluation.pair_making import NUM_FOLDS
from evaluation.verification import Pairs, stratified_folds
from utils import UserError

FORMS = "LFW's pairs.txt, CALFW's, or lines 'path1 path2 0/1'"
LONGEST_LINE = 4096  # characters
ENCODINGS = ("gb18030", "big5", "cp932", "euc_kr", "latin-1")  # of what is no UTF-8
GENUINE = "1 1.0 +1 true t yes y same match matched genuine positive pos"
IMPOSTOR = "0 0.0 -1 -1.0 false f no n different diff mismatch impostor imposter negative neg"
LABELS = dict.fromkeys(GENUINE.split(), True) | dict.fromkeys(IMPOSTOR.split(), False)

Find = Callable[[Sequence[str]], np.ndarray]  # FaceFolder.find


class Row(NamedTuple):
    """A line of the file that is neither empty nor a comment."""

    number: int  # of the line, from 1
    text: str
    fields: list[str]


class PairList(NamedTuple):
    """Pairs as a file names them, one item per pair in each list."""

    first: Sequence[str]
    second: Sequence[str]
    same: Sequence[bool]
    folds: np.ndarray | None = None  # (pairs,) int64, those of the file if it has any


class NotThisWayError(ValueError):
    """The file cannot be read in this way: at `row`, the first that does not fit.

    Where several ways end at the same row, the error is of the one that it is almost right in.
    """

    def __init__(self, row: Row, reason: str, what: str = "not a pair", *, almost: bool = True):
        super().__init__(f"line {row.number} is {what}: {row.text[:80]!r} ({reason})")
        self.progress = (row.number, almost)


# ------------------------------------------------------------------------------ reading


def read_pairs(path: Path | str, folder: FaceFolder) -> tuple[Pairs, np.ndarray]:
    """Read a list of pairs of a folder's images: the pairs, fold by fold, and (images,) int64.

    The latter are indices into folder.names, of Pairs.names. Folds are those of the file; where it
    has none or one, there are NUM_FOLDS that hold both kinds in the list's proportion. Raises
    UserError where the file is no list of pairs or names images that the folder does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"There is no {path}; get LFW's pairs.txt (python pre_process.py --download-lfw "
            "downloads it, too) or name one with --pairs."
        )
    try:
        listed, ends = parse_pairs(path.read_bytes(), folder.find)
    except ValueError as error:
        raise UserError(f"{path} is no list of pairs ({FORMS}): {error}.") from None
    if (ends < 0).any():
        paths = [end for pair in zip(listed.first, listed.second, strict=True) for end in pair]
        raise UserError(folder.explain(paths, ends.T.ravel(), path))
    same = np.array(listed.same, bool)
    identities = np.unique(folder.identities, return_inverse=True)[1][ends]
    if ((identities[0] == identities[1]) != same).all() and same.any() and not same.all():
        raise UserError(
            f"{path} seems to label impostor pairs as genuine and the reverse: "
            f"{listed.first[0]} and {listed.second[0]} are {'genuine' if same[0] else 'impostor'} "
            "there; write 1 for two images of one identity."
        )
    if listed.folds is not None and listed.folds.any():
        folds = listed.folds
        order = np.argsort(folds, kind="stable")
    else:
        folds, order = _make_folds(ends, same, identities, folder)
        if listed.folds is not None:
            print(f"{path} has a single fold; its pairs are split into {folds.max() + 1} folds.")
    # The images in the order of their first appearance.
    used, appearance, index = np.unique(
        ends[:, order].T.ravel(), return_index=True, return_inverse=True
    )
    rank = np.argsort(np.argsort(appearance))
    used = used[np.argsort(appearance)]
    first, second = rank[index].reshape(-1, 2).T
    names = [image_name(folder.names[i]) for i in used]
    return Pairs(names, first, second, same[order], folds[order]), used


def _make_folds(
    ends: np.ndarray, same: np.ndarray, identities: np.ndarray, folder: FaceFolder
) -> tuple[np.ndarray, np.ndarray]:
    """The fold of each pair, and the order of the pairs fold by fold: (pairs,) int64 each.

    A hash of each pair decides, so that the order of the list does not matter. But a list that is
    laid out in folds which share no identity, as LFW's is, keeps them.
    """
    paths = [image_path(name).encode("utf-8", "surrogateescape") for name in folder.names]
    pairs = (b"\0".join(sorted((paths[a], paths[b]))) for a, b in ends.T)
    digests = (hashlib.blake2b(pair, digest_size=7).digest() for pair in pairs)
    hashes = np.array([int.from_bytes(digest, "big") for digest in digests])
    ranks = np.arange(len(same))
    count = max(2, min(NUM_FOLDS, int(same.sum()), int((~same).sum())))
    by_hash, by_rank = (stratified_folds(same, keys, count) for keys in (hashes, ranks))

    def share_identities(folds: np.ndarray) -> bool:
        of_folds = np.unique(np.stack([identities.ravel(), np.tile(folds, 2)]), axis=1)
        return of_folds.shape[1] > len(np.unique(identities))

    # Where no folds share any, each identity being in one pair, the order is no layout.
    if share_identities(by_hash) and not share_identities(by_rank):
        return by_rank, np.lexsort((ranks, ~same, by_rank))
    return by_hash, np.lexsort((hashes, ~same, by_hash))


def parse_pairs(data: bytes, find: Find) -> tuple[PairList, np.ndarray]:
    """The pairs in the bytes of a file, and the indices (2, pairs) that `find` gives their paths.

    Some indices are negative if no way of reading the file gives names that are all found. Raises
    ValueError, naming the line, if there is no way at all.
    """
    error: ValueError = ValueError("it holds fewer than two lines of text")
    best: tuple[PairList, np.ndarray] | None = None
    for text in _decode(data):
        lines = [(n, line.strip()) for n, line in enumerate(re.split("\r\n|\r|\n", text), 1)]
        lines = [(n, line) for n, line in lines if line and not line.startswith("#")]
        for number, line in lines:
            if len(line) > LONGEST_LINE:
                raise ValueError(f"line {number} has {len(line):,} characters")
        for separate in SEPARATORS:
            rows = [Row(n, line, _clean(separate(line))) for n, line in lines]
            header = rows[0].fields if rows and _is_header(rows, find) else []
            for layout in LAYOUTS if rows[1:] else ():
                try:
                    listed = layout(rows[bool(header) :], header, find)
                except NotThisWayError as reason:
                    if reason.progress > getattr(error, "progress", (0, False)):
                        error = reason
                    continue
                ends = np.stack([find(listed.first), find(listed.second)])
                if (ends >= 0).all():
                    return listed, ends
                if best is None or (ends >= 0).sum() > (best[1] >= 0).sum():
                    best = listed, ends
    if best is None:
        raise error
    return best


def _decode(data: bytes) -> Iterator[str]:
    """The texts that bytes may stand for: one if they are UTF-8 or UTF-16."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings: Sequence[str] = ["utf-16"]
    elif b"\0" in data:
        is_little = data[1::2].count(0) >= data[::2].count(0)
        encodings = ["utf-16-le" if is_little else "utf-16-be"]
    else:
        encodings = ["utf-8-sig", *ENCODINGS]
    for encoding in encodings:
        try:
            yield data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if encoding == "utf-8-sig":
            return


# ------------------------------------------------------------------------------ columns


def _by(delimiter: str, line: str) -> list[str]:
    """The columns of a line of CSV."""
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:
        return []


def _label_and_paths(line: str) -> list[str]:
    label, _, rest = line.partition(" ")
    return [label, *PATHS.findall(rest)]


def _names_and_numbers(line: str) -> list[str]:
    """LFW's columns, of names that hold spaces."""
    fields: list[str] = []
    for is_number, run in groupby(line.split(), _is_number):
        words = list(run)
        fields += words if is_number else [" ".join(words)]
    return fields if len(fields) > 2 or all(map(_is_number, fields)) else []


# A path may hold spaces: it ends with the suffix of an image.
PATHS = re.compile(rf"\S.*?{IMAGE_SUFFIX.pattern[:-1]}(?=\s|$)|\S+", re.ASCII | re.IGNORECASE)
SEPARATORS: tuple[Callable[[str], list[str]], ...] = (
    *(partial(_by, delimiter) for delimiter in "\t,;|"),
    re.compile(r'"[^"]*"|\S+').findall,
    PATHS.findall,
    _label_and_paths,
    _names_and_numbers,
    re.compile(r"[\s,;|]+").split,
)


def _clean(fields: Sequence[str]) -> list[str]:
    return [field for text in fields if (field := text.strip().strip('"'))]


def _is_number(word: str) -> bool:
    # Limited in length: Python refuses to convert thousands of digits, or takes long.
    return word.isdecimal() and len(word) < 10


def _is_header(rows: Sequence[Row], find: Find) -> bool:
    """Whether the first row names the columns: no path, no number, nothing that comes again."""
    fields = rows[0].fields
    data = any(_is_number(f) or IMAGE_SUFFIX.search(f) or {*"/\\"} & {*f} for f in fields)
    if data or len(fields) < 2:
        return False
    below = {field for row in rows[1:] for field in row.fields}
    return below.isdisjoint(fields) and not (find(fields) >= 0).any()


# ------------------------------------------------------------------------------ layouts


def _lfw(digits: int, rows: Sequence[Row], header: list[str], find: Find) -> PairList:
    """LFW's: "name n1 n2" is genuine, "name1 n1 name2 n2" impostor, image name/name_<n>.

    Line 1 may hold the number of folds and of the pairs of each kind in a fold, or the latter only.
    """
    counts: list[int] = []
    if len(rows[0].fields) <= 2 and all(map(_is_number, rows[0].fields)):
        counts = [int(word) for word in rows[0].fields]
        counts = [1, *counts] if len(counts) == 1 else counts
    ends, same = [], []
    for row in rows[bool(counts) :]:
        words = row.fields
        if len(words) == 3:
            words = [words[0], words[1], words[0], words[2]]
        numbers = len(words) == 4 and _is_number(words[1]) and _is_number(words[3])
        if not numbers or {*"/\\"} & {*words[0], *words[2]}:
            raise NotThisWayError(row, "not 'name n1 n2' or 'name1 n1 name2 n2'", almost=False)
        ends.append([f"{n}/{n}_{int(i):0{digits}d}" for n, i in (words[:2], words[2:])])
        same.append(len(row.fields) == 3)
    folds = None
    if counts:
        if len(same) != counts[0] * 2 * counts[1]:
            promised = f"line {rows[0].number} promises {counts[0]} x 2 x {counts[1]} pairs"
            what = f"the last of {len(same):,} pairs, but {promised}"
            raise NotThisWayError(rows[-1], "download it again or correct that line", what)
        folds = np.repeat(np.arange(counts[0]), 2 * counts[1])
    first, second = zip(*ends, strict=True)
    return PairList(first, second, same, folds)


def _two_lines(rows: Sequence[Row], header: list[str], find: Find) -> PairList:
    """CALFW's and CPLFW's: two lines "file number" per pair; 0 is impostor, else it is the fold."""
    for row in rows:
        if len(row.fields) != 2 or not _is_number(row.fields[1]):
            raise NotThisWayError(row, "not 'file number'", almost=False)
    for one, other in zip(rows[::2], rows[1::2], strict=False):
        if one.fields[1] != other.fields[1]:
            raise NotThisWayError(other, "not the number of the line before it")
    if len(rows) % 2:
        raise NotThisWayError(rows[-1], "the second image is missing")
    numbers = np.array([int(row.fields[1]) for row in rows[::2]])
    same = numbers > 0
    files = [row.fields[0] for row in rows]
    names, folds = np.unique(numbers[same], return_inverse=True)
    if len(names) < 2:
        return PairList(files[::2], files[1::2], same)
    # Impostor pairs have no fold: each has as many of them, in the order of the file.
    numbers[same] = folds
    numbers[~same] = np.arange((~same).sum()) * len(names) // max(1, (~same).sum())
    return PairList(files[::2], files[1::2], same, numbers)


def _columns(rows: Sequence[Row], header: list[str], find: Find) -> PairList:
    """Two paths and a label in one line, in any order, and perhaps a fold; others are ignored."""
    width = len(rows[0].fields)
    for row in rows:
        if len(row.fields) != width or width < 3:
            raise NotThisWayError(row, f"not a label and two paths: {width} columns", almost=False)
    columns = list(zip(*(row.fields for row in rows), strict=True))
    known = [[word.lower() in LABELS for word in column] for column in columns]
    label = max(range(width), key=lambda i: (sum(known[i]), len({*columns[i]})))
    if not all(known[label]):
        row = rows[known[label].index(False)]
        raise NotThisWayError(row, "its label is not 1 or 0, true or false, same or different")
    others = [i for i in range(width) if i != label]
    if width > 3:
        others = [i for i in others if 2 * (find(columns[i]) >= 0).sum() > len(rows)]
    fold = [i for i, title in enumerate(header[:width]) if title.lower() in ("fold", "folds")]
    labels = [i for i in range(width) if all(known[i]) and len({*columns[i]}) > 1 and i not in fold]
    if len(others) != 2 or len(labels) > 1:
        raise NotThisWayError(rows[0], f"{len(others)} columns of paths, {len(labels)} of labels")
    same = [LABELS[word.lower()] for word in columns[label]]
    folds = np.unique(columns[fold[0]], return_inverse=True)[1] if fold else None
    return PairList(columns[others[0]], columns[others[1]], same, folds)


LAYOUTS = (partial(_lfw, 4), partial(_lfw, 1), _columns, _two_lines)
