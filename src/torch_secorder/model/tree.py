"""The modules of a model and the parameters that they own, each once, under the names that torch gives them.

torch's own ``named_modules()`` runs a generator inside of a generator for each level of the model. Every block of a monitor asks
for these lists several times, so that they are made here in one loop; a class that names its modules in another way is asked.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

Modules = Sequence[tuple[str, nn.Module]]


def modules_by_path(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` gives: every module once, with its path, parents before their children."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        found.append((path, module))
        if module._modules:
            start = f"{path}." if path else ""
            waiting += [(start + name, x) for name, x in reversed(module._modules.items()) if x is not None]
    kinds: set[type[nn.Module]] = {type(module) for module in seen}
    if any(kind.named_modules is not nn.Module.named_modules for kind in kinds):
        return list(model.named_modules())
    return found


def parameters_by_path(model: nn.Module, modules: Modules) -> list[tuple[str, Tensor]]:
    """What ``model.named_parameters()`` gives: every parameter once, with the first of its paths.

    Args:
        model: the model.
        modules: all of its modules, each once, with its path.
    """
    if type(model).named_parameters is not nn.Module.named_parameters:
        return list(model.named_parameters())
    found: list[tuple[str, Tensor]] = []
    seen: set[int] = set()
    for path, module in modules:
        for local, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                found.append((f"{path}.{local}" if path else local, p))
    return found
