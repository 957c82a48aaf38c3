"""The architectures: every kind of model that a library lists, by the library's own list."""

from __future__ import annotations

from collections.abc import Callable

from . import others
from .making import Made, transformers_architecture


def transformers_names() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    names = sorted(MODEL_MAPPING_NAMES)
    parts = [name for name in names if any(name.startswith(f"{whole}_") for whole in names)]
    return [name for name in names if name not in parts] + parts  # what is a part of another model comes last


SOURCES: dict[str, tuple[Callable[[], list[str]], Callable[[str], Made]]] = {
    "transformers": (transformers_names, transformers_architecture),
    "timm": (others.timm_names, others.timm_architecture),
    "vit-pytorch": (others.vit_names, others.vit_architecture),
    "x-transformers": (others.x_names, others.x_architecture),
    "segmentation-models-pytorch": (others.segmentation_names, others.segmentation_architecture),
}
