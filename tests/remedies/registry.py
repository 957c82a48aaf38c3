"""Which message's remedy is tried where, and which messages name a remedy."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "torch_secorder"

# Where a user's model or loop is refused. What is said of tables, files and arguments elsewhere has tests beside it.
ROOMS = (
    *("approximations", "autograd", "batch_axis", "capture", "graph", "model", "monitor.py", "per_sample", "recording"),
    *("results", "rules", "running", "verification"),
)

# A remedy is told in the imperative, after the reason.
VERBS = (
    "add average call change compute differentiate divide enter freeze give have keep leave let load make merge monitor move "
    "pass put return run save say set shard start store sum take teach train turn use write"
)
REMEDY = re.compile(rf"(?:[:;]|\bor|\band)\s(?:or |and |then )?(?:{'|'.join(VERBS.split())})\b")

Case = Callable[[], None]
CASES: dict[str, Case] = {}


def remedy(fragment: str) -> Callable[[Case], Case]:
    """A case that reproduces the refusal whose text has this fragment, and tries what it says."""

    def register(case: Case) -> Case:
        assert fragment not in CASES
        CASES[fragment] = case
        return case

    return register


def messages(*, all_of_them: bool = False) -> Iterator[tuple[str, str]]:
    """The messages of refusals that name a remedy, or all, each with its place; what is filled in stands as a star."""
    return ((place, text) for place, text in _all_messages() if all_of_them or REMEDY.search(text))


@cache  # Each case is looked for among them.
def _all_messages() -> list[tuple[str, str]]:
    paths = [path for path in sorted(SOURCE.rglob("*.py")) if path.relative_to(SOURCE).parts[0] in ROOMS]
    found = [(path.relative_to(SOURCE), one) for path in paths for one in _texts(ast.parse(path.read_text()))]
    return [(f"{path}:{line}", text) for path, (line, text) in found]


def _texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func).endswith("Error"):
            yield node.lineno, "".join(map(_text, node.args))


def _name(function: ast.expr) -> str:
    return getattr(function, "id", "") or getattr(function, "attr", "")


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "*"
