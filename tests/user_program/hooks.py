"""The hooks that people put on a model, each of which notes what it gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from user_program.observed import Run
from user_program.snapshots import snapshot

Hooked = Callable[[Run, nn.Module], None]


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if not list(module.children()))


def tensor_of(output: Any) -> Tensor:
    """The first tensor of a layer's output."""
    return output if isinstance(output, Tensor) else tensor_of(output[0])


def on_outputs(model: nn.Module, action: Callable[[str, Tensor], Any]) -> None:
    """Do this with the output of each layer, at each call that makes a graph."""

    def hook(name: str) -> Callable[..., None]:
        def after_forward(module: nn.Module, args: Any, output: Any) -> None:
            if tensor_of(output).grad_fn is not None:
                action(name, tensor_of(output))

        return after_forward

    for name, module in layers(model):
        module.register_forward_hook(hook(name))


def tensor_hooks(run: Run, model: nn.Module) -> None:
    on_outputs(model, lambda name, h: h.register_hook(lambda grad: run.note(f"the tensor hook on {name}", grad)))


def retained_gradients(run: Run, model: nn.Module) -> None:
    on_outputs(model, lambda name, h: run.keep(f"the output of {name}", h).retain_grad())


def module_forward_hooks(run: Run, model: nn.Module) -> None:
    for name, module in layers(model):
        module.register_forward_pre_hook(lambda m, args, name=name: run.note(f"the forward pre-hook on {name}", args))
        module.register_forward_hook(lambda m, args, out, name=name: run.note(f"the forward hook on {name}", args, out))


def full_backward_hooks(run: Run, model: nn.Module) -> None:
    for name, module in layers(model):
        module.register_full_backward_hook(
            lambda m, grad_in, grad_out, name=name: run.note(f"the full backward hook on {name}", grad_in, grad_out)
        )


def full_backward_pre_hooks(run: Run, model: nn.Module) -> None:
    for name, module in layers(model):
        module.register_full_backward_pre_hook(
            lambda m, grad_out, name=name: run.note(f"the full backward pre-hook on {name}", grad_out)
        )


def node_hooks(run: Run, model: nn.Module) -> None:
    def on_node(name: str, h: Tensor) -> None:
        assert h.grad_fn is not None
        h.grad_fn.register_prehook(lambda grad_out: run.note(f"the node prehook of {name}", grad_out))
        h.grad_fn.register_hook(lambda grad_in, grad_out: run.note(f"the node hook of {name}", grad_in, grad_out))

    on_outputs(model, on_node)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def parameter_hooks(run: Run, model: nn.Module) -> None:
    for name, p in trained(model):
        p.register_hook(lambda grad, name=name: run.note(f"the hook on parameter {name}", grad))


def post_accumulate_hooks(run: Run, model: nn.Module) -> None:
    for name, p in trained(model):
        p.register_post_accumulate_grad_hook(
            lambda p, name=name: run.note(f"the post-accumulate hook on {name}", p.grad)
        )


HOOKS: dict[str, Hooked] = {
    "tensor hooks": tensor_hooks,
    "retained gradients": retained_gradients,
    "module forward hooks": module_forward_hooks,
    "full backward hooks": full_backward_hooks,
    "full backward pre-hooks": full_backward_pre_hooks,
    "node hooks": node_hooks,
    "parameter hooks": parameter_hooks,
    "post-accumulate hooks": post_accumulate_hooks,
}


def all_hooks(run: Run, model: nn.Module) -> None:
    """Every kind that a model with operations in place can have."""
    for name, hooked in HOOKS.items():
        if "full backward" not in name:  # torch refuses these before operations in place
            hooked(run, model)


def packed(run: Run) -> AbstractContextManager[Any]:
    """Hooks for saved tensors, as offloading them uses."""

    def pack(x: Tensor) -> Tensor:
        run.packed.append(snapshot(x))
        return x

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
