"""Accuracy by demographic group, as it is reported on RFW: mean, deviation, skewed error ratio.

from evaluation.groups import group_metrics, group_table
print(group_table(group_metrics({"African": 0.9387, "Caucasian": 0.9737})))
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from evaluation.metrics import GroupMetrics
from evaluation.tables import percent_column


def group_metrics(accuracies: Mapping[str, float]) -> GroupMetrics:
    """How unequal the accuracies (fractions) of two or more groups are.

    By Wang and Deng: in "Mitigating Bias in Face Recognition Using Skewness-Aware Reinforcement
    Learning" (CVPR 2020) the deviation is the sample standard deviation (n - 1), and the skewed
    error ratio the highest error over the lowest; it is None where a group has no error.
    """
    values = np.array([*accuracies.values()])
    errors = 1 - values
    return {
        "accuracies": dict(accuracies),
        "mean": float(values.mean()),
        "deviation": float(values.std(ddof=1)),
        "skewed_error_ratio": float(errors.max() / errors.min()) if errors.min() > 0 else None,
    }


def group_table(groups: GroupMetrics) -> str:
    """The groups from the highest accuracy to the lowest, and the three metrics over them."""
    ranked = sorted(groups["accuracies"].items(), key=lambda item: -item[1])
    lines = [f"{name:<22}{percent_column(accuracy):>12}" for name, accuracy in ranked]
    ratio = groups["skewed_error_ratio"]
    return "\n".join(
        [
            f"{'group':<22}{'accuracy':>12}",
            *lines,
            f"{'mean':<22}{percent_column(groups['mean']):>12}",
            f"{'standard deviation':<22}{percent_column(groups['deviation']):>12}",
            f"{'skewed error ratio':<22}"
            + (f"{ratio:10.3f}" if ratio is not None else "  not defined: a group has no error"),
        ]
    )
