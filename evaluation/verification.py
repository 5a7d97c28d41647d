"""Face verification as LFW does it: scores, thresholds, folds, ROC. Pure maths, no files.

    from evaluation.verification import parse_pairs, pair_scores, verify
    pairs = parse_pairs(Path("data/pairs.txt").read_text("utf-8"))
    verify(pair_scores(embeddings, pairs.first, pairs.second), pairs.same, pairs.folds)

A pair is called the same person where its score, the cosine of two embeddings, is at least the
threshold. Every rate is a fraction of one, every angle is in degrees.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.metrics import auc, roc_curve

from evaluation.metrics import VerificationMetrics

SUFFIXES = {"jpg", "jpeg", "png", "bmp", "webp", "ppm", "gif", "tif", "tiff"}  # of images
FARS = ("1e-3", "1e-2")  # 1e-4 means nothing on the 3,000 impostor pairs of LFW


class Pairs(NamedTuple):
    """Pairs of images: indices into names, whether each is one person, and its fold."""

    names: list[str]  # "Name/Name_0001", without a suffix, in order of first appearance
    first: np.ndarray  # (pairs,) int64, indices into names
    second: np.ndarray  # (pairs,) int64
    same: np.ndarray  # (pairs,) bool
    folds: np.ndarray  # (pairs,) int64, 0-based


class Folds(NamedTuple):
    """What cross-validation found, one value a fold: (folds,) float64 each."""

    accuracies: np.ndarray
    thresholds: np.ndarray


class Roc(NamedTuple):
    """Rates at every threshold, from accepting nothing to accepting everything: (points,) each."""

    far: np.ndarray
    tar: np.ndarray
    thresholds: np.ndarray


def parse_pairs(text: str) -> Pairs:
    """Read LFW's pairs.txt: a line "folds count", then a block of 2 x count pairs for each fold.

    A pair is "name n1 n2" (one person) or "name1 n1 name2 n2" (two); the fold is the block.
    Raises ValueError, naming the line, where the text is anything else.
    """
    lines = [line.strip() for line in text.removeprefix("\ufeff").splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    header = lines[0].split() if lines else []
    if len(header) != 2 or not all(_is_number(word) and int(word) > 0 for word in header):
        raise ValueError("line 1 must hold two numbers, of folds and of pairs (LFW: 10 and 300)")
    num_folds, count = map(int, header)
    if len(lines) - 1 != num_folds * 2 * count:
        raise ValueError(
            f"line 1 promises {num_folds} x 2 x {count} pairs, but {len(lines) - 1} lines follow"
        )
    index: dict[str, int] = {}
    first, second, same = [], [], []
    for number, line in enumerate(lines[1:], start=2):
        words = line.split("\t") if "\t" in line else line.split()
        if len(words) == 3:
            words = [words[0], words[1], words[0], words[2]]
            same.append(True)
        elif len(words) == 4:
            same.append(False)
        if len(words) != 4 or not (_is_number(words[1]) and _is_number(words[3])):
            raise ValueError(f"line {number} is no pair: {line[:80]!r}")
        for side, name, image in ((first, *words[:2]), (second, *words[2:])):
            side.append(index.setdefault(f"{name}/{name}_{int(image):04d}", len(index)))
    folds = np.repeat(np.arange(num_folds), 2 * count)
    return Pairs(list(index), np.array(first), np.array(second), np.array(same), folds)


def parse_pair_list(text: str) -> Pairs:
    """Read lines "path1 path2 0/1" (spaces, or tabs where paths hold spaces); 1 is one person.

    Paths lose their suffix; folds are contiguous tenths. Raises ValueError, naming the line, where
    a line is anything else.
    """
    index: dict[str, int] = {}
    ends, same = [], []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        if not line.strip():
            continue
        words = line.strip().split("\t") if "\t" in line else line.split()
        if len(words) != 3 or words[2] not in ("0", "1"):
            raise ValueError(f"line {number} is not 'path1 path2 0/1': {line[:80]!r}")
        ends.append([index.setdefault(without_suffix(path), len(index)) for path in words[:2]])
        same.append(words[2] == "1")
    if len(same) < 2:
        raise ValueError(f"it holds {len(same)} pairs")
    folds = contiguous_folds(len(same), min(10, len(same)))
    return Pairs(list(index), *np.array(ends).T, np.array(same), folds)


def without_suffix(path: str) -> str:
    """An image's path without its suffix: "./a.b/c.d.jpg" is "a.b/c.d", and so it stays."""
    path = path.replace("\\", "/").removeprefix("./")
    stem, _, suffix = path.rpartition(".")
    return stem if suffix.lower() in SUFFIXES else path


def _is_number(word: str) -> bool:
    return word.isdecimal() and len(word) < 10


def image_name(source: str) -> str:
    """What pairs.txt calls an image: "any/root/Name/Name_0001.jpg" is "Name/Name_0001"."""
    return "/".join(without_suffix(source).split("/")[-2:])


def contiguous_folds(pairs: int, folds: int = 10) -> np.ndarray:
    """Cut pairs into runs of neighbours, as scikit-learn's KFold(folds, shuffle=False) does.

    Returns (pairs,) int64; where folds does not divide pairs the first ones hold one more. It is
    how InsightFace evaluates its .bin sets, which do not carry the folds themselves.
    """
    sizes = np.full(folds, pairs // folds)
    sizes[: pairs % folds] += 1
    return np.repeat(np.arange(folds), sizes)


def pair_scores(
    embeddings: np.ndarray, first: np.ndarray, second: np.ndarray, chunk: int = 65536
) -> np.ndarray:
    """Cosine of each pair: embeddings (n, d) of any length, indices (pairs,) -> (pairs,) float64.

    An embedding of zeros has a cosine of 0 with everything. Works in float64 on chunk pairs at a
    time, so that memory does not grow with their number.
    """
    scores = np.zeros(len(first))
    for start in range(0, len(first), chunk):
        part = slice(start, start + chunk)
        left = embeddings[first[part]].astype(np.float64)
        right = embeddings[second[part]].astype(np.float64)
        lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        products = np.einsum("nd,nd->n", left, right)
        np.divide(products, lengths, out=scores[part], where=lengths > 0)
    return scores.clip(-1, 1)


def to_degrees(cosine: np.ndarray | float) -> np.ndarray:
    """Angle between two unit vectors in degrees, 0 to 180, from their cosine."""
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def accuracy(scores: np.ndarray, same: np.ndarray, threshold: float) -> float:
    """Fraction of pairs judged rightly where those scoring at least threshold are accepted."""
    return float(np.mean((scores >= threshold) == same))


def best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """The threshold that judges most pairs rightly, exact, in O(n log n).

    Candidates are the midpoints between neighbouring distinct scores, the lowest score (accept
    all) and the next number above the highest (accept none). Of equally good ones it is that with
    the widest gap between its two neighbours, which errs least on pairs not seen; of equally wide
    ones the lowest. scores (n,), same (n,) bool.
    """
    values, where = np.unique(scores, return_inverse=True)
    matched = np.bincount(where, weights=same, minlength=len(values))
    mismatched = np.bincount(where, weights=~same, minlength=len(values))
    # right[i]: pairs judged rightly when the i lowest distinct scores are refused.
    right = matched.sum() + np.concatenate([[0], np.cumsum(mismatched - matched)])
    # Half the way, but never on the lower neighbour: rounding could put it there.
    middle = np.maximum(values[:-1] + np.diff(values) / 2, np.nextafter(values[:-1], np.inf))
    candidates = np.concatenate([values[:1], middle, np.nextafter(values[-1:], np.inf)])
    gaps = np.concatenate([[0], np.diff(values), [0]])
    return float(candidates[np.argmax(np.where(right == right.max(), gaps, -1))])


def cross_validate(scores: np.ndarray, same: np.ndarray, folds: np.ndarray) -> Folds:
    """Accuracy on each fold with the threshold that is best on all the others.

    scores (n,), or (folds, n) where they depend on the fold held out; same (n,) bool, folds (n,)
    int. Raises ValueError for fewer than two folds.
    """
    numbers = np.unique(folds)
    if len(numbers) < 2:
        raise ValueError("cross-validation needs at least two folds")
    thresholds, accuracies = [], []
    for k, row in zip(numbers, np.broadcast_to(scores, (len(numbers), len(same))), strict=True):
        thresholds.append(best_threshold(row[folds != k], same[folds != k]))
        accuracies.append(accuracy(row[folds == k], same[folds == k], thresholds[-1]))
    return Folds(np.array(accuracies), np.array(thresholds))


def worst_errors(
    scores: np.ndarray, same: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs accepted and refused wrongly at a threshold, worst first: indices (fp,), (fn,)."""
    order = np.argsort(scores, kind="stable")
    refused = scores[order] < threshold
    false_negatives = order[refused & same[order]]
    false_positives = order[~refused & ~same[order]][::-1]
    return false_positives, false_negatives


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Standard error of a mean: standard deviation with n - 1, over the root of n.

    LFW's report (Huang et al. 2007) asks for this; InsightFace prints np.std, sqrt(n - 1) larger.
    """
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def roc(scores: np.ndarray, same: np.ndarray) -> Roc:
    """Every point of the ROC curve; raises ValueError where one of the two kinds is missing."""
    if same.all() or not same.any():
        raise ValueError("an ROC curve needs matched and mismatched pairs")
    # All points are kept: where scores are tied, the largest TAR under a FAR can be one that
    # scikit-learn calls superfluous, since it lies on the line between its neighbours.
    return Roc(*roc_curve(same, scores, drop_intermediate=False))


def tar_at_far(curve: Roc, far: float) -> float:
    """Largest fraction of matched pairs accepted while mismatched ones stay at or under far."""
    return float(curve.tar[curve.far <= far].max())


def equal_error_rate(curve: Roc) -> float:
    """The rate at which false accepts equal false rejects, linear between points of the curve."""
    excess = (1 - curve.tar) - curve.far  # falls from 1 (accept none) to -1 (accept all)
    after = int(np.argmax(excess <= 0))
    before = after - 1
    share = excess[before] / (excess[before] - excess[after])
    return float(curve.far[before] + share * (curve.far[after] - curve.far[before]))


def verify(
    scores: np.ndarray, same: np.ndarray, folds: np.ndarray, validated: Folds | None = None
) -> VerificationMetrics:
    """Everything that is reported about a set of pairs, as plain numbers (JSON can hold them).

    scores (n,) cosines, same (n,) bool, folds (n,) int. accuracy is the mean over folds and
    threshold the mean of their thresholds; best_accuracy is that of the single threshold fitted on
    the very pairs it is scored on, hence never lower where folds are equal. Thresholds are cosines
    and, as *_degrees, angles. validated takes the place of cross_validate's outcome.
    Raises ValueError for one fold or one kind of pair only.
    """
    validated = validated or cross_validate(scores, same, folds)
    curve = roc(scores, same)
    best = best_threshold(scores, same)
    threshold = float(validated.thresholds.mean())
    return {
        "accuracy": float(validated.accuracies.mean()),
        "standard_error": standard_error(validated.accuracies),
        "threshold": threshold,
        "threshold_degrees": float(to_degrees(threshold)),
        "best_accuracy": accuracy(scores, same, best),
        "best_threshold": best,
        "best_threshold_degrees": float(to_degrees(best)),
        "tar_at_far": {far: tar_at_far(curve, float(far)) for far in FARS},
        "auc": float(auc(curve.far, curve.tar)),
        "eer": equal_error_rate(curve),
        "pairs": len(scores),
        "matched_pairs": int(same.sum()),
        "fold_accuracies": validated.accuracies.tolist(),
        "fold_thresholds": validated.thresholds.tolist(),
    }
