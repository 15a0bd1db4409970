"""Whether a model's confidence can be believed, and when it should rather ask back.

Works on plain numbers: how sure the model was of each prediction, and whether it was right. What
counts as right is metrics.py's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class CalibrationBin(NamedTuple):
    """The predictions whose confidence lies in (low, high]; the means are nan if there are none."""

    low: float
    high: float
    num_examples: int
    confidence: float
    accuracy: float


class Coverage(NamedTuple):
    """What is left if only predictions of at least `threshold` confidence are acted on."""

    threshold: float
    coverage: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Whether `confidence` can be believed, and what asking back below a threshold would buy.

    `curve` runs from the most confident prediction to all of them, one point for each confidence
    that occurs.
    """

    bins: tuple[CalibrationBin, ...]
    expected_error: float
    curve: tuple[Coverage, ...]

    def threshold_for(self, accuracy: float) -> Coverage | None:
        """The lowest threshold whose accepted predictions reach `accuracy`; None if none does."""
        return next((c for c in reversed(self.curve) if c.accuracy >= accuracy), None)


def calibrate(
    confidences: Sequence[float], is_match: Sequence[bool], *, num_bins: int = 15
) -> Calibration:
    """Compare confidence (0 to 1) with how often it is right.

    The expected calibration error is the mean of |accuracy - confidence| over equal-width bins,
    weighted by their examples; nan without examples. Source: Guo et al., "On Calibration of Modern
    Neural Networks", ICML 2017, whose 15 bins are the default.
    """
    pairs = sorted(zip(confidences, is_match, strict=True), reverse=True)
    members: list[list[tuple[float, bool]]] = [[] for _ in range(num_bins)]
    for pair in pairs:
        # A product of probabilities may come out a rounding error above 1.
        members[min(max(math.ceil(pair[0] * num_bins), 1), num_bins) - 1].append(pair)
    bins = tuple(
        CalibrationBin(
            i / num_bins,
            (i + 1) / num_bins,
            len(held),
            _mean([confidence for confidence, _ in held]),
            _mean([matched for _, matched in held]),
        )
        for i, held in enumerate(members)
    )
    gaps = [abs(b.accuracy - b.confidence) * b.num_examples for b in bins if b.num_examples]
    error = sum(gaps) / len(pairs) if pairs else math.nan
    return Calibration(bins, error, tuple(_coverage_curve(pairs)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _coverage_curve(pairs: Sequence[tuple[float, bool]]) -> Iterable[Coverage]:
    """`pairs` by falling confidence; equal confidences are accepted together."""
    num_right = 0
    for i, (confidence, matched) in enumerate(pairs, 1):
        num_right += matched
        if i == len(pairs) or pairs[i][0] < confidence:
            yield Coverage(confidence, i / len(pairs), num_right / i)


def calibration_figure(calibration: Calibration) -> Figure:
    """Draw the reliability diagram, and accuracy against coverage beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="tight")
    reliability, coverage = figure.subplots(1, 2)
    filled = [b for b in calibration.bins if b.num_examples]
    reliability.bar(
        [b.low for b in filled],
        [b.accuracy for b in filled],
        width=1 / len(calibration.bins),
        align="edge",
        color="#9ecae1",
        edgecolor="white",
    )
    reliability.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1)
    reliability.plot(
        [b.confidence for b in filled], [b.accuracy for b in filled], "o", color="#08519c"
    )
    reliability.set(xlabel="confidence", ylabel="call match", xlim=(0, 1), ylim=(0, 1.02))
    reliability.set_title(f"expected calibration error {calibration.expected_error:.3f}")
    points = calibration.curve
    coverage.plot([p.coverage for p in points], [p.accuracy for p in points], color="#08519c")
    coverage.set(xlabel="share of commands acted on", ylabel="call match among them", xlim=(0, 1))
    coverage.set_title("asking back below a confidence")
    for axes in (reliability, coverage):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure
