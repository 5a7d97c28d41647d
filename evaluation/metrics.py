"""The metrics of an evaluation, typed: what lfw.json and eval.json hold, key by key.

    metrics: Metrics = evaluate_set(model, test_set, protocol).metrics
    metrics["accuracy"], metrics["tar_at_far"]["1e-3"]

Every rate is a fraction of 1, every angle in degrees; scores and thresholds are cosines, and a FAR
is a key such as "1e-3". The order of the fields below is the order of the keys in the file.
evaluation/evaluate.py fills them in. "matched" in a key means genuine, "mismatched" impostor: the
keys are older than the words and stay, because files written earlier have them.
"""

from __future__ import annotations

from typing import Any, TypedDict

# (low, high) of a 95 % confidence interval.
Interval = tuple[float, float]


class VerificationMetrics(TypedDict):
    """Metrics of scored pairs, computed by verification.verify."""

    accuracy: float  # mean over the folds, each at the best threshold of the other folds
    standard_error: float  # of that mean
    threshold: float  # mean over the folds
    threshold_degrees: float
    best_accuracy: float  # at the best threshold on the test pairs (optimistic)
    best_threshold: float
    best_threshold_degrees: float
    tar_at_far: dict[str, float]
    auc: float
    eer: float
    pairs: int
    matched_pairs: int  # genuine pairs
    fold_accuracies: list[float]
    fold_thresholds: list[float]


class ProtocolName(TypedDict, total=False):
    """The protocol by which metrics were computed."""

    protocol: dict[str, Any]  # the fields of protocols.Protocol
    protocol_in_words: str


class InsightFaceMetrics(TypedDict, total=False):
    """Further metrics that InsightFace quotes, under its protocol only."""

    standard_deviation: float  # of the folds' accuracies
    val: float  # "VAL at FAR val_far"
    val_far: float


class ProtocolMetrics(VerificationMetrics, ProtocolName, InsightFaceMetrics):
    """Metrics of scored pairs by a protocol, computed by protocols.evaluate_views."""


class SetMetrics(ProtocolMetrics, total=False):
    """Metrics of a model on a test set; training fills in the two counts of faces only."""

    faces: int
    missed_faces: int | None  # not detected: cropped centrally; None: the set came aligned
    false_positives: int  # at best_threshold
    false_negatives: int
    flip: bool
    test_set: str  # its path
    from_cache: bool  # no embedding had to be computed
    seconds: float


class Intervals(TypedDict):
    """95 % confidence intervals by a bootstrap over identities."""

    accuracy: Interval
    tar_at_far: dict[str, Interval]
    eer: Interval


class OperatingPoint(TypedDict):
    """The lowest threshold that keeps to a FAR, and its error rates."""

    wanted: str  # the FAR asked for
    threshold: float
    degrees: float
    far: float  # the FAR reached
    frr: float


# A bin of the reliability diagram; functional syntax, since "from" is a keyword.
CalibrationBin = TypedDict(
    "CalibrationBin",
    {"from": float, "to": float, "pairs": int, "probability": float, "matched": float},
)


class Calibration(TypedDict):
    """P(genuine) as a logistic function of the cosine, and how well it is calibrated."""

    slope: float
    intercept: float
    share_matched: float  # of genuine pairs in the set
    ece: float  # expected calibration error on held-out folds
    brier: float
    bins: list[CalibrationBin]


class Statistics(TypedDict, total=False):
    """What the metrics of a set are worth; calibration needs both kinds of pair in every fold."""

    intervals: Intervals
    identities: int
    identities_known: str  # how the identities are known, in words
    resamples: int
    operating_points: list[OperatingPoint]
    operating_points_refused: list[str]  # a sentence for each FAR that the set is too small for
    calibration: Calibration


class RobustnessMetrics(TypedDict):
    """Metrics under one corruption of the second image of each pair."""

    accuracy: float  # thresholds fitted on the corrupted pairs of the other folds
    standard_error: float
    eer: float
    auc: float
    accuracy_as_set: float  # thresholds fitted on the clean pairs of the other folds
    tar_at_far: dict[str, float]
    matched_cosine: float  # mean of the genuine pairs
    mismatched_cosine: float  # mean of the impostor pairs


class Metrics(SetMetrics, Statistics, total=False):
    """All metrics of a model on a test set."""

    robustness: dict[str, RobustnessMetrics]  # by corruption, "clean" first


# ------------------------------------------------------------------------------ low FARs


class TarPoint(TypedDict):
    """TAR at one FAR; pairs that score above the threshold are accepted."""

    tar: float
    threshold: float
    impostors: int  # impostor pairs that the FAR allows to be accepted


class AllPairsMetrics(TypedDict):
    """Metrics of all pairs of a set of images, computed by all_pairs.tar_at_low_fars."""

    pictures: int  # the key of earlier versions: images
    identities: int
    matched_pairs: int  # genuine
    mismatched_pairs: int  # impostor
    tar_at_far: dict[str, TarPoint]
    refused: list[str]  # a sentence for each FAR that the set is too small for


class IdentificationMetrics(TypedDict):
    """A search of probes in a gallery, computed by templates.identify."""

    rank1: float  # fraction of mated probes whose identity has the highest score
    rank5: float
    tpir: dict[str, float]  # by FPIR: fraction of mated probes found above its threshold
    mated: int  # probes whose identity is in the gallery
    others: int  # searches that the FPIR is measured on
    best_non_mates: bool  # these are mated probes without their mate


class IjbMetrics(TypedDict):
    """Metrics of IJB-B or IJB-C, computed by ijb.evaluate_ijb."""

    pairs: int
    matched_pairs: int  # genuine
    tar_at_far: dict[str, TarPoint]
    pictures: int  # the key of earlier versions: images
    templates: int
    identification: dict[str, IdentificationMetrics]  # by gallery; empty without 1:N lists


# ------------------------------------------------------------------------------ the files


class ModelInfo(TypedDict, total=False):
    """What is known of an evaluated model."""

    kind: str  # "ours", "state dict" or "onnx"
    epoch: int  # checkpoints of train.py only
    seed: int
    network: str
    init: str  # the checkpoint that a run of train.py began with, and its SHA-256
    init_sha256: str
    notes: list[str]  # third-party models: the pixels they are given, what was chosen and left out
    checkpoint: str  # path
    checksum: str  # SHA-256 of the file and of the input it expects


class Comparison(TypedDict):
    """Two models on the same pairs: first minus second, computed by significance.compare_paired."""

    accuracy_difference: float
    accuracy_interval: Interval
    tar_interval: dict[str, Interval]
    eer_interval: Interval
    only_first_right: int  # pairs that only the first model classifies correctly
    only_second_right: int
    mcnemar_p: float
    noise: bool  # the difference is not statistically significant
    verdict: str  # the same in a sentence


class ComparedMetrics(Metrics, total=False):
    """Metrics of another model on a set, and how it compares with the evaluated one."""

    comparison: Comparison


class ComparedModel(ModelInfo):
    """Another model (last.pt beside best.pt, or --against) on the same sets."""

    sets: dict[str, ComparedMetrics]


class EvaluationInfo(ModelInfo):
    """What lfw.json and eval.json say besides the metrics."""

    compared_with: list[ComparedModel]
    versions: dict[str, str]


class LfwJson(Metrics, EvaluationInfo):
    """lfw.json: one test set."""


class GroupMetrics(TypedDict):
    """How unequal the accuracies of demographic groups are, computed by groups.group_metrics."""

    accuracies: dict[str, float]  # by group
    mean: float
    deviation: float  # sample standard deviation
    skewed_error_ratio: float | None  # highest error over lowest; None if a group has no error


class EvalJson(EvaluationInfo, total=False):
    """eval.json: the sets named by --sets or --groups."""

    sets: dict[str, Metrics]
    groups: GroupMetrics  # of --groups only
