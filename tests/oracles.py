"""Independent answers: plain autograd loops in float64, `vmap(grad)`, and what "equal" means.

Of the library only its public oracle is imported, which is such a loop itself. A sample is one index of the batch axis; l_n
is N times its share of the batch's loss under "mean" and its share under "sum".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_secorder.testing import sample_gradients

Inputs = Any  # a tensor, a tuple of positional inputs, or a mapping of keyword inputs
Loss = Callable[[Tensor, Tensor], Tensor]

TOLERANCES = {torch.float32: (1e-4, 1e-12), torch.float64: (1e-8, 1e-20)}


def assert_equal(actual: Any, expected: Any, total: Any, dtype: torch.dtype | None = None) -> None:
    """Fail unless |actual - expected| <= rtol |expected| + atol * total, elementwise, in the tolerances of `dtype`."""
    rtol, atol = TOLERANCES[dtype or actual.dtype]
    actual, expected, total = (torch.as_tensor(x).detach().to("cpu", torch.float64) for x in (actual, expected, total))
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} against {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"not finite: {actual}"
    excess = (actual - expected).abs() - (rtol * expected.abs() + atol * total)
    assert (excess <= 0).all(), (
        f"worst relative error {float(relative_error(actual, expected)):.3e}\n{actual}\n{expected}"
    )


def relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """The largest |actual - expected| / |expected|; 0 where both are zero."""
    difference = (actual.double() - expected.double()).abs()
    return torch.where(difference == 0, 0.0, difference / expected.double().abs()).max()


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's outputs for a tensor, a tuple of positional inputs, or a mapping of keyword inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def mapped(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """`inputs` with `function` applied to each of its tensors."""
    if isinstance(inputs, Mapping):
        return {key: function(value) for key, value in inputs.items()}
    return tuple(function(value) for value in inputs) if isinstance(inputs, tuple) else function(inputs)


def sample(inputs: Inputs, n: int) -> Inputs:
    """Sample n as a batch of one."""
    return mapped(inputs, lambda tensor: tensor[n : n + 1])


def batch_size(inputs: Inputs) -> int:
    if isinstance(inputs, Tensor):
        return len(inputs)
    return len(next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs)))


def double(x: Any) -> Any:
    """`x` in float64, integers and booleans left alone."""
    return mapped(x, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def analyzed(model: nn.Module, parameters: str = "trainable") -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if parameters == "all" or p.requires_grad}


def double_copy(model: nn.Module, parameters: str = "trainable") -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A float64 copy of the model and its analyzed parameters, which require grad in the copy."""
    twin = copy.deepcopy(model).double()
    named = analyzed(twin, parameters)
    for parameter in named.values():
        parameter.requires_grad_(True)
    return twin, named


def dense_gradients(loss: Tensor, named: Mapping[str, nn.Parameter], retain_graph: bool = False) -> dict[str, Tensor]:
    """The gradient of `loss` in every named parameter, by a plain backward; zeros where the loss does not reach."""
    for parameter in named.values():
        parameter.grad = None
    loss.backward(retain_graph=retain_graph)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for name, p in named.items()}


def per_sample_losses(model: nn.Module, loss_fn: Loss, inputs: Inputs, targets: Tensor) -> list[Callable[[], Tensor]]:
    """l_n, each a call that runs sample n alone: for losses whose normalizer is N."""
    return [
        lambda n=n: loss_fn(call(model, sample(inputs, n)), targets[n : n + 1])  # type: ignore[misc]
        for n in range(batch_size(inputs))
    ]


def per_sample_gradients(
    model: nn.Module,
    loss_fn: Loss,
    inputs: Inputs,
    targets: Tensor,
    *,
    parameters: str = "trainable",
    shares_of: str | None = None,
) -> dict[str, Tensor]:
    """g_n per parameter, [n, *shape], from a loop; `shares_of` (a reduction) for normalizers that are not N."""
    if shares_of is not None:
        names = list(analyzed(model, parameters))
        return sample_gradients(model, loss_fn, inputs, targets, names=names, reduction=shares_of)
    twin, named = double_copy(model, parameters)
    if isinstance(loss_fn, nn.Module):
        loss_fn = copy.deepcopy(loss_fn).double()
    losses = per_sample_losses(twin, loss_fn, double(inputs), double(targets))
    rows = [dense_gradients(loss(), named) for loss in losses]
    return {name: torch.stack([row[name] for row in rows]) for name in named}


def squared_norms(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """||g_n||^2 per parameter, [n]."""
    return {name: g[:, None].flatten(1).square().sum(1) for name, g in gradients.items()}


def per_sample_squared_norms(
    model: nn.Module,
    loss_fn: Loss,
    inputs: Inputs,
    targets: Tensor,
    *,
    parameters: str = "trainable",
    shares_of: str | None = None,
) -> dict[str, Tensor]:
    """t_{n,p} = ||g_{n,p}||^2 per parameter, [n], from a float64 loop over samples."""
    return squared_norms(
        per_sample_gradients(model, loss_fn, inputs, targets, parameters=parameters, shares_of=shares_of)
    )


def vmap_gradients(
    model: nn.Module, loss_fn: Loss, inputs: Inputs, targets: Tensor, *, parameters: str = "trainable"
) -> dict[str, Tensor]:
    """g_n per parameter, [n, *shape], from torch.func's vmap(grad) in float64: for losses whose normalizer is N."""
    twin, named = double_copy(model, parameters)
    values = {name: p.detach() for name, p in named.items()}

    def loss(values: dict[str, Tensor], inputs: Inputs, target: Tensor) -> Tensor:
        batch = mapped(inputs, lambda tensor: tensor.unsqueeze(0))
        args, kwargs = (
            ((), batch) if isinstance(batch, Mapping) else (batch if isinstance(batch, tuple) else (batch,), {})
        )
        outputs = torch.func.functional_call(twin, values, args, kwargs)
        return loss_fn(outputs, target.unsqueeze(0))

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(values, double(inputs), double(targets))


def trace(squared: Mapping[str, Tensor], reduction: str = "mean") -> dict[str, Tensor]:
    """c * sum_n t_{n,p}, from the per-sample squared norms of all the samples seen."""
    return {name: t.mean() if reduction == "mean" else t.sum() for name, t in squared.items()}


def total(values: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([value.sum() for value in values.values()]).sum()


def activation_squared_norms(
    model: nn.Module, module_name: str, loss_fn: Loss, inputs: Inputs, targets: Tensor
) -> Tensor:
    """||gradient of l_n with respect to the module's output||^2, [n], from a float64 loop over samples."""
    twin, _ = double_copy(model, "all")
    seen: list[Tensor] = []
    twin.get_submodule(module_name).register_forward_hook(lambda module, args, output: seen.append(output))
    rows = []
    for loss in per_sample_losses(twin, loss_fn, double(inputs), double(targets)):
        seen.clear()
        (gradient,) = torch.autograd.grad(loss(), seen)
        rows.append(gradient.square().sum())
    return torch.stack(rows)


def output_curvature(output: Tensor, loss_type: str, ignored: Tensor | None = None, class_axis: int = 1) -> Tensor:
    """A_n as an explicit matrix over the flattened elements of one sample's `output`, a batch of one.

    `ignored` marks the positions of "nll", in the order of the output without its class axis, that contribute nothing.
    """
    f = output.detach()
    if loss_type == "mse":
        return torch.eye(f.numel(), dtype=f.dtype)
    if loss_type == "poisson":
        return torch.diag(f.flatten().exp())
    if loss_type == "bce":
        p = f.flatten().sigmoid()
        return torch.diag(p * (1 - p))
    element = torch.arange(f.numel()).reshape(f.shape).movedim(class_axis, -1).reshape(-1, f.shape[class_axis])
    logits = f.movedim(class_axis, -1).reshape(-1, f.shape[class_axis])
    curvature = torch.zeros(f.numel(), f.numel(), dtype=f.dtype)
    for position, (index, row) in enumerate(zip(element, logits, strict=True)):
        if ignored is not None and ignored.flatten()[position]:
            continue
        p = row.softmax(0)
        curvature[index[:, None], index] = torch.diag(p) - torch.outer(p, p)
    return curvature


def jacobians(output: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """d output / d p of each parameter, ``[elements, entries]``, by plain autograd.

    Of all elements at once, or of one after the other where a gradient is sparse.
    """
    elements, options = output.numel(), {"retain_graph": True, "allow_unused": True}
    each = torch.eye(elements, dtype=output.dtype).view(elements, *output.shape)
    try:
        found = torch.autograd.grad(output, parameters, each, is_grads_batched=True, **options)
    except RuntimeError:
        rows = [torch.autograd.grad(output, parameters, one, **options) for one in each]
        columns = zip(*rows, strict=True)
        found = tuple(None if column[0] is None else torch.stack([g.to_dense() for g in column]) for column in columns)
    return [
        output.new_zeros(elements, p.numel()) if g is None else g.reshape(elements, -1)
        for g, p in zip(found, parameters, strict=True)
    ]


def exact_fisher(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor | None = None,
    loss_type: str = "nll",
    *,
    ignore_index: int = -100,
    class_axis: int = 1,
    parameters: str = "trainable",
) -> dict[str, Tensor]:
    """tr(J_n^T A_n J_n) per parameter, [n]: a float64 loop over samples and output elements, with the explicit A_n."""
    twin, named = double_copy(model, parameters)
    inputs = double(inputs)
    rows: list[dict[str, Tensor]] = []
    for n in range(batch_size(inputs)):
        output = call(twin, sample(inputs, n))
        ignored = None if targets is None or loss_type != "nll" else targets[n] == ignore_index
        curvature = output_curvature(output, loss_type, ignored, class_axis)
        jacobian = zip(named, jacobians(output, list(named.values())), strict=True)
        rows.append({name: (curvature * (j @ j.T)).sum() for name, j in jacobian})
    return {name: torch.stack([row[name] for row in rows]) for name in named}
