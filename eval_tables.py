"""What lfw_eval.py prints: reports as tables of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval_sets import SetResult


def percent(value: float) -> str:
    """A rate as "  99.367 %"."""
    return f"{100 * value:8.3f} %"


def set_table(report: dict[str, Any]) -> str:
    """A set's report, one line a number."""
    folds = len(report["fold_accuracies"])
    mismatched = report["pairs"] - report["matched_pairs"]
    spread = f"+- {100 * report['standard_error']:.3f} standard error"
    if "standard_deviation" in report:
        spread = f"+- {100 * report['standard_deviation']:.3f} standard deviation of the folds"
    lines = [
        (
            f"accuracy, {folds} folds",
            percent(report["accuracy"]),
            f"{spread}; thresholds of {report['threshold']:.4f} on average, "
            f"{report['threshold_degrees']:.2f} degrees",
        ),
        (
            "best single threshold",
            percent(report["best_accuracy"]),
            f"at {report['best_threshold']:.4f}, {report['best_threshold_degrees']:.2f} degrees; "
            f"{report['false_positives']} false positives, {report['false_negatives']} negatives",
        ),
    ]
    for far, tar in report["tar_at_far"].items():
        note = f"rests on {round(float(far) * mismatched)} mismatched pairs"
        lines.append((f"TAR at FAR {far}", percent(tar), note))
    if "val" in report:
        lines.append(
            (f"VAL at FAR {report['val_far']:g}", percent(report["val"]), "mean over folds")
        )
    lines += [("AUC", f"{report['auc']:10.6f}", ""), ("EER", percent(report["eer"]), "")]
    rows = [f"{name:<22}{value:>12}  {note}".rstrip() for name, value, note in lines]
    return "\n".join([*rows, f"Protocol: {report['protocol_in_words']}."])


def summary_table(results: Sequence[SetResult]) -> str:
    """One line a set."""
    lines = [
        f"{'set':<12}{'pairs':>8}{'faces':>8}{'accuracy':>12}{'+-':>8}{'threshold':>11}{'EER':>11}"
    ]
    for result in results:
        report = result.report
        spread = report.get("standard_deviation", report["standard_error"])
        lines.append(
            f"{result.test_set.name:<12}{report['pairs']:>8,}{report['faces']:>8,}"
            f"{percent(report['accuracy']):>12}{100 * spread:>8.3f}{report['threshold']:>11.4f}"
            f"{percent(report['eer']):>11}"
        )
    return "\n".join(lines)
