"""The tables of text that lfw_eval.py prints."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.metrics import Comparison, Metrics
from evaluation.pair_sets import SetResult


def percent_column(value: float) -> str:
    """A fraction in per cent, of a width of 10 characters below 1000 %: "  99.367 %"."""
    return f"{100 * value:8.3f} %"


def format_interval(interval: Sequence[float]) -> str:
    """An interval of a rate, in per cent: "[99.09, 99.57]"."""
    low, high = interval
    return f"[{100 * low:.2f}, {100 * high:.2f}]"


def set_table(metrics: Metrics) -> str:
    """The metrics of one test set, one per line, with 95 % bootstrap intervals."""
    folds = len(metrics["fold_accuracies"])
    impostors = metrics["pairs"] - metrics["matched_pairs"]
    spread = f"+- {100 * metrics['standard_error']:.3f} standard error"
    if "standard_deviation" in metrics:
        spread = f"+- {100 * metrics['standard_deviation']:.3f} standard deviation of the folds"
    intervals = metrics["intervals"]
    lines = [
        (
            f"accuracy, {folds} folds",
            percent_column(metrics["accuracy"]),
            f"{spread}, 95 % {format_interval(intervals['accuracy'])}; mean threshold "
            f"{metrics['threshold']:.4f}, {metrics['threshold_degrees']:.2f} degrees",
        ),
        (
            "best threshold",
            percent_column(metrics["best_accuracy"]),
            f"on the test pairs (optimistic): {metrics['best_threshold']:.4f}, "
            f"{metrics['best_threshold_degrees']:.2f} degrees; {metrics['false_positives']} false "
            f"positives, {metrics['false_negatives']} false negatives",
        ),
    ]
    for far, tar in metrics["tar_at_far"].items():
        # How many impostor pairs decide the rate says how far it can be believed.
        note = f"95 % {format_interval(intervals['tar_at_far'][far])}; decided by "
        note += f"{round(float(far) * impostors)} of {impostors:,} impostor pairs"
        lines.append((f"TAR at FAR {far}", percent_column(tar), note))
    if "val" in metrics:
        note = "mean over folds"
        lines.append((f"VAL at FAR {metrics['val_far']:g}", percent_column(metrics["val"]), note))
    lines.append(("AUC", f"{metrics['auc']:10.6f}", ""))
    eer_note = f"95 % {format_interval(intervals['eer'])}"
    lines.append(("EER", percent_column(metrics["eer"]), eer_note))
    rows = [f"{name:<22}{value:>12}  {note}".rstrip() for name, value, note in lines]
    thresholds = " ".join(f"{value:.4f}" for value in metrics["fold_thresholds"])
    rows += [f"thresholds by fold: {thresholds}", *operating_point_rows(metrics)]
    rows += _calibration_rows(metrics)
    rows.append(
        f"95 % intervals: bootstrap over {metrics['identities']:,} identities (known "
        f"{metrics['identities_known']}), {metrics['resamples']:,} resamples."
    )
    rows.append(f"Protocol: {metrics['protocol_in_words']}.")
    return "\n".join(rows)


def operating_point_rows(metrics: Metrics) -> list[str]:
    """Lines of thresholds with their rates, and of FARs that the set cannot support."""
    rows = [f"{'threshold':>9} {'degrees':>8} {'FAR':>9} {'FRR':>9}"]
    for point in metrics["operating_points"]:
        rates = f"{100 * point['far']:7.3f} % {100 * point['frr']:7.3f} %"
        rows.append(f"{point['threshold']:9.4f} {point['degrees']:8.2f} {rates}")
    return rows + metrics["operating_points_refused"]


def _calibration_rows(metrics: Metrics) -> list[str]:
    """A line of how cosines are probabilities, where that is known."""
    if "calibration" not in metrics:
        return []
    calibration = metrics["calibration"]
    return [
        f"P(same identity) = 1 / (1 + exp({-calibration['intercept']:.3f} - "
        f"{calibration['slope']:.3f} * cosine)) where {100 * calibration['share_matched']:.0f} % "
        f"of pairs are genuine; ECE {100 * calibration['ece']:.2f} % on held-out folds"
    ]


def comparison_table(
    names: Sequence[str],
    first: Sequence[SetResult],
    second: Sequence[SetResult],
    comparisons: Sequence[Comparison],
) -> str:
    """Two models on each set, their difference, and whether it is statistically significant."""
    lines = [f"{'set':<12}{'first':>12}{'second':>12}{'difference':>12}  95 %"]
    for a, b, comparison in zip(first, second, comparisons, strict=True):
        difference = f"{100 * (a.metrics['accuracy'] - b.metrics['accuracy']):+.3f}"
        lines.append(
            f"{a.test_set.name:<12}{percent_column(a.metrics['accuracy']):>12}"
            f"{percent_column(b.metrics['accuracy']):>12}{difference:>12}  "
            f"{format_interval(comparison['accuracy_interval'])}"
        )
        lines.append(f"{'':<12}  {comparison['verdict']}")
    return "\n".join([f"first: {names[0]}", f"second: {names[1]}", *lines])


def summary_table(results: Sequence[SetResult]) -> str:
    """One line per test set."""
    lines = [
        f"{'set':<12}{'pairs':>8}{'faces':>8}{'accuracy':>12}{'+-':>8}{'threshold':>11}{'EER':>11}"
    ]
    for result in results:
        metrics = result.metrics
        spread = metrics.get("standard_deviation", metrics["standard_error"])
        lines.append(
            f"{result.test_set.name:<12}{metrics['pairs']:>8,}{metrics['faces']:>8,}"
            f"{percent_column(metrics['accuracy']):>12}{100 * spread:>8.3f}"
            f"{metrics['threshold']:>11.4f}{percent_column(metrics['eer']):>11}"
        )
    return "\n".join(lines)
