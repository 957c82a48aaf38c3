"""Names of parameters and modules as the user wrote them, without what wrappers add."""

from __future__ import annotations

import re

# Path components that wrappers add to a module's name, and that the user never wrote.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_names_wrapper = re.compile("|".join(sorted(WRAPPERS))).search


def plain_name(name: str) -> str:
    """``name`` without what wrappers added to it."""
    if _names_wrapper(name) is None:
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
