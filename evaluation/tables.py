"""What lfw_eval.py prints: reports as tables of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evaluation.pair_sets import SetResult


def percent(value: float) -> str:
    """A rate as "  99.367 %"."""
    return f"{100 * value:8.3f} %"


def within(interval: Sequence[float]) -> str:
    """A 95 % interval of a rate as "[99.09, 99.57]"."""
    return f"[{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"


def set_table(report: dict[str, Any]) -> str:
    """A set's report, one line a number; the last column is the 95 % interval by identity."""
    folds = len(report["fold_accuracies"])
    mismatched = report["pairs"] - report["matched_pairs"]
    spread = f"+- {100 * report['standard_error']:.3f} standard error"
    if "standard_deviation" in report:
        spread = f"+- {100 * report['standard_deviation']:.3f} standard deviation of the folds"
    known = report["intervals"]
    lines = [
        (
            f"accuracy, {folds} folds",
            percent(report["accuracy"]),
            f"{spread}, 95 % {within(known['accuracy'])}; thresholds of "
            f"{report['threshold']:.4f} on average, {report['threshold_degrees']:.2f} degrees",
        ),
        (
            "best single threshold",
            percent(report["best_accuracy"]),
            f"at {report['best_threshold']:.4f}, {report['best_threshold_degrees']:.2f} degrees; "
            f"{report['false_positives']} false positives, {report['false_negatives']} negatives",
        ),
    ]
    for far, tar in report["tar_at_far"].items():
        note = f"95 % {within(known['tar_at_far'][far])}; rests on "
        note += f"{round(float(far) * mismatched)} mismatched pairs"
        lines.append((f"TAR at FAR {far}", percent(tar), note))
    if "val" in report:
        lines.append((f"VAL at FAR {report['val_far']:g}", percent(report["val"]), "by folds"))
    lines.append(("AUC", f"{report['auc']:10.6f}", ""))
    lines.append(("EER", percent(report["eer"]), f"95 % {within(known['eer'])}"))
    rows = [f"{name:<22}{value:>12}  {note}".rstrip() for name, value, note in lines]
    thresholds = " ".join(f"{value:.4f}" for value in report["fold_thresholds"])
    rows += [f"thresholds by fold: {thresholds}", *operating_rows(report)]
    rows.append(
        f"Intervals: {report['resamples']:,} resamples of {report['identities']:,} people, told "
        f"apart {report['identities_known']}."
    )
    return "\n".join([*rows, f"Protocol: {report['protocol_in_words']}."])


def operating_rows(report: dict[str, Any]) -> list[str]:
    """Thresholds to choose from, what the set does not support, and the calibration."""
    rows = [f"{'threshold':>9} {'degrees':>8} {'FAR':>9} {'FRR':>9}"]
    for point in report["operating_points"]:
        rates = f"{100 * point['far']:7.3f} % {100 * point['frr']:7.3f} %"
        rows.append(f"{point['threshold']:9.4f} {point['degrees']:8.2f} {rates}")
    rows += report["operating_points_refused"]
    if "calibration" in report:
        found = report["calibration"]
        rows.append(
            f"P(same person) = 1 / (1 + exp({-found['intercept']:.3f} - {found['slope']:.3f} * "
            f"cosine)) where {found['share_matched']:.0%} of pairs match; ECE "
            f"{100 * found['ece']:.2f} % on folds not seen"
        )
    return rows


def comparison_table(
    names: Sequence[str],
    first: Sequence[SetResult],
    second: Sequence[SetResult],
    compared: Sequence[dict[str, Any]],
) -> str:
    """Two models on each set, their difference, and whether it is noise."""
    lines = [f"{'set':<12}{'first':>12}{'second':>12}{'difference':>12}  95 %"]
    for a, b, found in zip(first, second, compared, strict=True):
        difference = f"{100 * (a.metrics['accuracy'] - b.metrics['accuracy']):+.3f}"
        lines.append(
            f"{a.test_set.name:<12}{percent(a.metrics['accuracy']):>12}"
            f"{percent(b.metrics['accuracy']):>12}{difference:>12}  "
            f"{within(found['accuracy_interval'])}"
        )
        lines.append(f"{'':<12}  {found['verdict']}")
    return "\n".join([f"first: {names[0]}", f"second: {names[1]}", *lines])


def summary_table(results: Sequence[SetResult]) -> str:
    """One line a set."""
    lines = [
        f"{'set':<12}{'pairs':>8}{'faces':>8}{'accuracy':>12}{'+-':>8}{'threshold':>11}{'EER':>11}"
    ]
    for result in results:
        report = result.metrics
        spread = report.get("standard_deviation", report["standard_error"])
        lines.append(
            f"{result.test_set.name:<12}{report['pairs']:>8,}{report['faces']:>8,}"
            f"{percent(report['accuracy']):>12}{100 * spread:>8.3f}{report['threshold']:>11.4f}"
            f"{percent(report['eer']):>11}"
        )
    return "\n".join(lines)
