"""The architectures: every kind of model that a library lists, by the library's own list."""

from __future__ import annotations

from collections.abc import Callable

from .making import Made, transformers_architecture


def transformers_names() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(MODEL_MAPPING_NAMES)


SOURCES: dict[str, tuple[Callable[[], list[str]], Callable[[str], Made]]] = {
    "transformers": (transformers_names, transformers_architecture),
}
