"""Names of parameters and modules as the user wrote them, without what wrappers add."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Path components that wrappers add to a module's name, and that the user never wrote.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_names_wrapper = re.compile("|".join(sorted(WRAPPERS))).search


def any_from_wrappers(names: Sequence[str]) -> bool:
    """Whether wrappers added something to one of these names, which are looked through at once."""
    return _names_wrapper("\n".join(names)) is not None


def plain_name(name: str) -> str:
    """``name`` without what wrappers added to it."""
    if _names_wrapper(name) is None:
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
