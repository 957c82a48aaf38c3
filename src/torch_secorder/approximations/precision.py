"""The decision whether enough samples were seen, by a relative standard error in place of a number of batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from torch_secorder.arguments import ErrorOf, require_choice
from torch_secorder.errors import ArgumentError
from torch_secorder.results.statistics import Statistics

# A standard error is an estimate itself. From n samples of a normal distribution it is off by 1 / sqrt(2 n) of its size, and from
# two or three samples it is worthless. No run stops with fewer samples than these, from which it is off by an eighth.
FEWEST_SAMPLES = 32

# A gradient that vanishes by symmetry has a trace that is rounding, which no number of samples makes precise: a row counts as
# precise once its standard error is below this fraction of the total.
OF_TOTAL = 1e-12


@dataclass(frozen=True)
class Precision:
    """A relative standard error to reach.

    Attributes:
        rtol: the error as a fraction of the trace.
        of: "total" for the total over all parameters, or "rows" for each of them.
    """

    rtol: float
    of: ErrorOf = "total"

    def __post_init__(self) -> None:
        if isinstance(self.rtol, bool) or not isinstance(self.rtol, (int, float)) or not 0 < self.rtol < math.inf:
            raise ArgumentError(f"rtol must be a positive number, such as 0.05 for five per cent, not {self.rtol!r}")
        require_choice("rtol_of", self.of, get_args(ErrorOf))

    def error(self, statistics: Statistics) -> float:
        """The largest relative standard error of the traces that count; NaN for fewer than two samples."""
        moments = statistics.squared_norms
        if moments.n < 2:
            return math.nan
        total = float(moments.mean.sum())
        if self.of == "total":
            own = math.sqrt(max(0.0, float(moments.moments.sum())) / (moments.n - 1) / moments.n)
            return own / total if total else 0.0
        errors = (moments.moments.diagonal() / (moments.n - 1) / moments.n).sqrt()
        counted = errors > OF_TOTAL * total
        return float((errors[counted] / moments.mean[counted]).max()) if bool(counted.any()) else 0.0

    def is_reached(self, statistics: Statistics) -> bool:
        """Whether enough samples were seen: too few do not reach any error, which they can't tell."""
        return statistics.n >= FEWEST_SAMPLES and self.error(statistics) <= self.rtol

    def facts(self, statistics: Statistics) -> dict[str, float | str | bool]:
        """What a report says of it."""
        return {
            "rtol": self.rtol,
            "rtol_of": self.of,
            "relative_stderr": self.error(statistics),
            "reached_rtol": self.is_reached(statistics),
        }

    def as_text(self, statistics: Statistics) -> str:
        """The error so far beside what is to be reached, for a progress bar; nothing before there is one."""
        if math.isnan(error := self.error(statistics)):
            return ""
        return f"stderr {error:.1%} of the {'total' if self.of == 'total' else 'least precise row'}, stops at {self.rtol:.1%}"
