"""The result of a check of the library's numbers, as text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch_secorder.results.text import aligned, number

if TYPE_CHECKING:
    import pandas as pd


def checked_as_text(checked: pd.DataFrame) -> str:
    """The result of :func:`torch_secorder.testing.check`, as text for a terminal."""
    header = ["parameter", "library", "loop", "relative error", "verdict"]
    rows = [
        [str(name), number(row["library"]), number(row["loop"]), f"{row['relative_error']:.1e}", row["verdict"]]
        for name, row in zip(checked.index, checked.to_dict("records"), strict=True)
    ]
    facts = checked.attrs
    verdict = "the library and the loop agree" if facts["equal"] else "THE LIBRARY AND THE LOOP DIFFER"
    mode = ", in eval mode" if facts["mode"] == "eval" else ""
    kind = f"empirical Fisher, {facts['reduction']} over {facts['n_samples']} samples{mode}"
    return f"{aligned([header, *rows])}\n\n{verdict} ({kind})"
