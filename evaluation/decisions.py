"""Same identity or not: a model's threshold and probabilities, from its own evaluation on LFW.

    decision = read_decision(model, flip=True, command="python lfw_eval.py ...")
    threshold, origin = decision.choose_threshold(far="1e-2")
    decision.format_probabilities(scores)

The default threshold is that of the ten-fold accuracy. Every evaluation has it, and its accuracy
was measured on pairs that did not choose it. A threshold at a FAR needs 30 errors to be known: LFW
supports FAR 1e-2, which accepts more than the accuracy's threshold, but not 1e-3. A search compares
with every face of a gallery, and a false one among many is likely: its threshold is higher.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from scipy.stats import norm

from evaluation.calibration import genuine_probability
from evaluation.evaluated_model import EvaluatedModel
from evaluation.tables import operating_point_rows
from utils import UserError

# The fraction of searches for somebody who is not in a gallery that may find a face in it: nominal,
# since impostors' tail is heavier than a normal one. On LFW, among 60 to 7,701 faces, 0 to 0.07 do
# (of the pairs' threshold 0.08 to 1.0), and 97 to 100 % of the others are found (MobileFaceNet).
SEARCH_FPIR = 0.01


@dataclasses.dataclass(frozen=True)
class Decision:
    """What lfw.json says about a model; where it says nothing, `problem` is a sentence."""

    problem: str
    threshold: float | None = None  # a cosine, of the ten-fold accuracy
    accuracy: str = ""  # at it, in words
    test_set: str = ""  # with its number of pairs, in words
    by_far: dict[float, float] = dataclasses.field(default_factory=dict)  # thresholds
    rows: tuple[str, ...] = ()  # a table of those, and of FARs that are not supported
    platt: tuple[float, float] | None = None  # slope and intercept
    genuine_share: float = 0.5  # of genuine pairs in the test set, which probabilities hold for

    def format_probabilities(self, scores: Sequence[float]) -> list[str]:
        """P(same identity) of cosines (n,) in words, none certain; empty without a calibration."""
        if not self.platt:
            return [""] * len(scores)
        percent = 100 * genuine_probability(np.asarray(scores, np.float64), *self.platt)
        return [
            "< 0.01 %" if p < 0.01 else "> 99.99 %" if p > 99.99 else f"{p:.2f} %" for p in percent
        ]

    def choose_threshold(
        self, far: str = "", given: float = 0.0, faces: int = 1
    ) -> tuple[float | None, str]:
        """The cosine from which two faces are one identity, and where it comes from, in words.

        `given` wins unless it is 0, then the threshold at `far`, then that of the accuracy or, for
        a search among `faces`, that at a FAR of SEARCH_FPIR / faces: the normal distribution
        through the two lowest FARs known says where it is. None without an evaluation. UserError
        where the evaluation does not support `far`.
        """
        if given:
            return given, "as given by --threshold"
        if not far:
            if faces > 1 and len(self.by_far) > 1:
                (low, first), (high, second) = sorted(self.by_far.items())[:2]
                z, low_z, high_z = norm.isf([SEARCH_FPIR / faces, low, high])
                reached = first + (z - low_z) * (first - second) / (low_z - high_z)
                if reached > self.threshold:
                    return float(reached), (
                        f"a nominal FPIR of {SEARCH_FPIR} among {faces:,} faces, extrapolated from "
                        f"FARs {low:g} and {high:g} on {self.test_set}"
                    )
            return self.threshold, f"{self.accuracy} on {self.test_set}"
        if self.threshold is None:
            raise UserError(f"--far needs the model's evaluation. {self.problem}")
        try:
            return self.by_far[float(far)], f"FAR {far} on {self.test_set}"
        except (KeyError, ValueError):
            table = "\n".join(self.rows)
            raise UserError(
                f"The evaluation on {self.test_set} has no threshold at FAR {far}:\n{table}"
            ) from None


def read_decision(model: EvaluatedModel, flip: bool, command: str) -> Decision:
    """The evaluation in the model's folder, if it is of this very model and of these embeddings.

    `flip`: embeddings include the mirror image. `command` evaluates the model, for `problem`.
    """
    path = model.folder / "lfw.json"
    advice = f"`{command}` evaluates it, which gives thresholds and probabilities"
    try:
        metrics = json.loads(path.read_text("utf-8"))
        protocol, calibration = metrics["protocol"], metrics.get("calibration")
        decision = Decision(
            "",
            float(metrics["threshold"]),
            f"{100 * metrics['accuracy']:.2f} % +- {100 * metrics['standard_error']:.2f} accurate",
            f"{metrics['pairs']:,} pairs of {metrics['test_set']}",
            {float(p["wanted"]): float(p["threshold"]) for p in metrics["operating_points"]},
            tuple(operating_point_rows(metrics)),
        )
        if calibration:
            numbers = [float(calibration[k]) for k in ("slope", "intercept", "share_matched")]
            decision = dataclasses.replace(
                decision, platt=(numbers[0], numbers[1]), genuine_share=numbers[2]
            )
        embedding = protocol["flip"], protocol["fuse"], protocol["subtract_mean"]
        words, checksum = metrics["protocol_in_words"], metrics["checksum"]
    except FileNotFoundError:
        return Decision(f"This model has no evaluation ({path}): {advice}.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        return Decision(f"{path} is corrupt ({reason}): {advice} again.")
    if checksum != model.checksum:
        return Decision(f"{path} is of another model, or of an earlier state of it: {advice}.")
    if embedding != (flip, "sum", False):
        return Decision(f"{path} was measured on other embeddings ({words}): {advice}.")
    return decision
