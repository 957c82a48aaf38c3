"""Masks of parameters that a model reads from a module without calling that module.

Torch applies a mask when the module that holds the parameter is called. A ``ParameterList`` is never called, nor is the output
projection of ``nn.MultiheadAttention``. Their weights would stay what they were when they were pruned, whatever an optimizer
does, and a second backward pass would fail on the graph of the first. The module around them is called, and applies their masks
then.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# Modules that only hold others, or parameters.
_HOLDERS = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict)


class AppliesMasks:
    """A hook that runs before a module's forward and applies the masks of a module inside of it.

    Once :func:`torch.nn.utils.prune.remove` has taken the masks away, it does nothing.

    Args:
        path: the name of the module inside.
    """

    def __init__(self, path: str):
        self._path = path

    def __call__(self, module: nn.Module, inputs: object) -> None:
        """Multiply each parameter of the module inside that has a mask with it."""
        inside = module.get_submodule(self._path)
        for name, mask in list(inside.named_buffers(recurse=False)):
            local = name.removesuffix("_mask")
            original: Any = getattr(inside, f"{local}_orig", None) if local != name else None
            if original is not None:
                setattr(inside, local, mask.to(original.dtype) * original)


def apply_where_called(model: nn.Module, module: nn.Module) -> None:
    """See to it that the masks of a module are applied although it may never be called itself."""
    for path in [name for name, one in model.named_modules() if one is module]:
        around, inside = path, ""
        while around and _is_uncalled(model, around):
            around, _, last = around.rpartition(".")
            inside = f"{last}.{inside}".rstrip(".")
        if inside:
            model.get_submodule(around).register_forward_pre_hook(AppliesMasks(inside))


def _is_uncalled(model: nn.Module, path: str) -> bool:
    """Whether a module's parameters are read by the module around it, which does not call it."""
    around = model.get_submodule(path.rpartition(".")[0])
    return isinstance(model.get_submodule(path), _HOLDERS) or isinstance(around, nn.MultiheadAttention)
