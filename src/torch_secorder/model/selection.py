"""Which of a model's parameters a selection means: a word, names and patterns, or a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import Tensor, nn

from torch_secorder.arguments import described
from torch_secorder.errors import ArgumentError
from torch_secorder.model.names import plain_name

Selection = str | Iterable[str] | Callable[[str, Tensor], bool]


def selected(model: nn.Module, named: Sequence[tuple[str, Tensor]], selection: Selection) -> list[tuple[str, Tensor]]:
    """The parameters that a selection means, in the order of ``named_parameters()``, each under the first of its names.

    Args:
        model: the model.
        named: all of its parameters.
        selection: "trainable" for parameters that require a gradient; "all"; a name, a pattern as of :mod:`fnmatch`, or several
            of them; or a function from a name and a parameter to whether it is meant. Names are without wrappers, and each name
            of a tied parameter counts. Any selection but "trainable" may include frozen parameters.

    Raises:
        ArgumentError: for anything else, a pattern that no parameter has, and a selection of none.
    """
    if isinstance(selection, str) and selection in ("trainable", "all"):
        return [(name, p) for name, p in named if selection == "all" or p.requires_grad]
    if callable(selection):
        found = [(name, p) for name, p in named if _is_meant(selection, plain_name(name), p)]
    else:
        wanted = _matching(model, _patterns(selection))
        found = [(name, p) for name, p in named if id(p) in wanted]
    if not found:
        raise ArgumentError(f"parameters= selects none of the {len(named)} parameters of {type(model).__name__}")
    return found


def _is_meant(selection: Callable[[str, Tensor], bool], name: str, parameter: Tensor) -> bool:
    try:
        return bool(selection(name, parameter))
    except Exception as error:
        raise ArgumentError(
            f"parameters= is a function that fails for {name!r}: it is called with (name, parameter) and returns whether the "
            f"parameter is meant ({type(error).__name__}: {error!s:.200})"
        ) from error


def _patterns(selection: object) -> list[str]:
    given = [selection] if isinstance(selection, str) or not isinstance(selection, Iterable) else list(selection)
    patterns = [item for item in given if isinstance(item, str)]
    if len(patterns) < len(given):
        other = next(item for item in given if not isinstance(item, str))
        raise ArgumentError(
            'parameters must be "trainable", "all", names or patterns of names, such as ["*.weight"], or a function (name, '
            f"parameter) -> bool, not {described(other)}; to choose parameters "
            "by what they are, pass a function, such as lambda name, parameter: parameter.dim() == 2"
        )
    return patterns


def _matching(model: nn.Module, patterns: list[str]) -> set[int]:
    """The ids of the parameters with a name that matches one of the patterns."""
    names = [(plain_name(name), id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    wanted: set[int] = set()
    for pattern in patterns:
        found = {key for name, key in names if fnmatchcase(name, pattern)}
        if not found:
            near = get_close_matches(pattern, [name for name, _ in names], 3, 0.3)
            raise ArgumentError(
                f"parameters: {type(model).__name__} has no parameter that matches {pattern!r}"
                + (f"; the nearest are {', '.join(near)}" if near else "")
                + '; patterns match whole names ("*.weight", "layers.0.*")'
            )
        wanted |= found
    return wanted
