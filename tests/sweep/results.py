"""The file of results: a line for each architecture that was run, of which the last counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.jsonl")
Key = tuple[str, str]  # a library and its name of an architecture


def last_rows(path: Path = RESULTS) -> dict[Key, dict[str, Any]]:
    """The last row of each architecture."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(row["source"], row["name"]): row for row in map(json.loads, lines)}


def appended(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def tidied(path: Path = RESULTS) -> None:
    """One line for each architecture, in order."""
    rows = last_rows(path)
    path.write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)))
