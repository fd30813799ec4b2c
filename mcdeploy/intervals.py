"""A measured value with its 95 % interval, and the one way in which ``bench`` makes it: from independent units.

Times that follow each other resemble each other: the machine drifts for seconds, and a model that is loaded once keeps
the memory it got. Treating such times as independent, as a plain bootstrap does, gives intervals that are too narrow
to hold in the next run. So the measurement is cut into units, each long and, where possible, each with models that
were loaded anew, and only the spread between units counts (sectioning; Asmussen and Glynn, Stochastic Simulation,
2007, III.5b).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Interval:
    """A measured value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Full width as a share of the value; 0.02 is 2 %."""
        return (self.high - self.low) / self.value


def interval_of_units(value: float, units: Sequence[float]) -> Interval:
    """Value times exp(+-t s / sqrt(n)), where s is how far the n units' own values lie from it, on a log scale.

    Units that still resemble the one before them count for less: with r the correlation of neighbours, n becomes
    n (1 - r) / (1 + r), as for a process of first order, and s grows by what such neighbours hide. A negative r is
    taken as 0.

    Args:
        value: of the whole measurement, positive.
        units: the same quantity, each of one unit alone, positive, in the order of time; 2 or more.

    Raises:
        ValueError: fewer than 2 units.
    """
    from scipy.special import stdtrit  # Student's quantiles; loaded late, since --help does not need it

    n = len(units)
    if n < 2:
        raise ValueError(f"an interval needs 2 units or more, got {n}")
    apart = [math.log(unit / value) for unit in units]
    variance = sum(one * one for one in apart) / (n - 1)
    likeness = (1 + _correlation_of_neighbours(apart)) / (1 - _correlation_of_neighbours(apart))
    alone = max(2.0, n / likeness)
    hidden = max(0.2, 1 - (likeness - 1) / (n - 1))
    reach = float(stdtrit(alone - 1, 0.975)) * math.sqrt(variance / hidden / alone)
    if not reach:
        return Interval(value, value, value)  # exp and log would cost a rounding error
    return Interval(value, value * math.exp(-reach), value * math.exp(reach))


def _correlation_of_neighbours(apart: Sequence[float]) -> float:
    """0 to 0.8, with the first-order correction for the mean that was taken out of so few."""
    n = len(apart)
    mean = sum(apart) / n
    squares = sum((one - mean) ** 2 for one in apart)
    if n < 4 or not squares:
        return 0.0
    raw = sum((a - mean) * (b - mean) for a, b in pairwise(apart)) / squares
    return min(0.8, max(0.0, raw + (1 + 3 * raw) / n if raw > 0 else 0.0))


def digits(value: float) -> str:
    """Three significant digits and no exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def with_interval(interval: Interval) -> str:
    """Such as ``0.512 [0.508, 0.516]``."""
    return f"{digits(interval.value)} [{digits(interval.low)}, {digits(interval.high)}]"
