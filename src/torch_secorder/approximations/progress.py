"""The progress bar of a report: batches, the backward passes of a batch that takes many, and the total so far."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from torch_secorder.results.report import Report
from torch_secorder.results.results import Results

# A batch of at least MANY backward passes gets a bar of its own. With more than VERY_MANY, "exact" says what "sampled" costs.
MANY, VERY_MANY = 10, 100


class Progress:
    """Shows on stderr how far a report is, with tqdm if that is installed.

    Args:
        shown: whether anything is shown.
        fisher: which Fisher the report is of.
        anywhere: whether bars are drawn also where stderr is no terminal, but a file or a pipe; notebooks have theirs.
    """

    def __init__(self, shown: bool, fisher: str, *, anywhere: bool = False):
        self._tqdm = _tqdm(anywhere=anywhere) if shown else None
        self._tells_cost = shown and fisher == "exact"
        self._bar: Any = None
        self._is_counted = False  # whether the bar has counted the latest batch

    def over(self, data: Iterable[Any], total: int | None) -> Iterator[Any]:
        """The batches. The bar counts each of them, once it is done."""
        if self._tqdm is None:
            yield from data
            return
        with self._tqdm(total=total, desc="Fisher", unit="batch", leave=False) as self._bar:
            for batch in data:
                self._is_counted = False
                yield batch
                if not self._is_counted:
                    self._bar.update()

    def passes(self, count: int, output_gradients: Iterator[Tensor]) -> Iterable[Tensor]:
        """The gradients with which a batch's backward passes start. A second bar counts them if they are many."""
        if count > VERY_MANY and self._tells_cost:
            self._tells_cost = False
            self._say(
                f'fisher="exact" takes {count:,} backward passes for each batch here; fisher="sampled" takes num_samples of '
                "them, 1 by default, for an unbiased estimate"
            )
        if self._tqdm is None or count < MANY:
            return output_gradients
        return self._tqdm(output_gradients, total=count, desc="this batch", unit="pass", leave=False)

    def show(self, results: Results, precision: str = "") -> None:
        """Count a batch, and show the total of all batches so far, its standard error, and the error that is asked for."""
        if self._bar is not None:
            report = Report(results.rows, results.statistics, results.reduction, results.fisher)
            total = f"trace {report.trace:.4g} ± {report.trace_stderr:.2g}"
            self._bar.set_postfix_str(", ".join(filter(None, (total, precision))), refresh=False)
            self._bar.update()
            self._bar.refresh()
            self._is_counted = True

    def _say(self, text: str) -> None:
        if self._tqdm is None:
            print(text, file=sys.stderr)
        else:
            self._tqdm.write(text, file=sys.stderr)


def _tqdm(*, anywhere: bool) -> Any:
    """The class of bars; None without tqdm, or where nobody would see a bar move."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    in_notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
    return tqdm if anywhere or in_notebook or sys.stderr.isatty() else None
