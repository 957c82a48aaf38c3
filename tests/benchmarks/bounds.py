"""The least that the numbers cost: the best products known, called by hand from plain hooks, with no check and no bookkeeping.

What a bound costs above a plain step is the price of the numbers themselves. What the library costs above a bound is the price of
its checks and its bookkeeping, or of a product that it chose badly. A bound knows the layers of the workloads and nothing else,
and it may take a number to be right that the library has to prove.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import partial, singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.products import Fastest, of_channels, of_convolution, of_features, of_matrices, squared
from benchmarks.steps import Step, bare
from benchmarks.workloads import Loss
from torch_secorder.autograd.engine import current_node
from torch_secorder.autograd.onednn import KIND, gates_in_workspace, left_by_backward
from torch_secorder.autograd.saved import saved
from torch_secorder.per_sample import Convolution

SMALL = 2**13  # numbers in an input up to which all layers with inputs and outputs of one size are computed together
REGISTER = 16  # positions that fill a vector register


class Sums:
    """What the hooks of one model find in a step.

    Attributes:
        n: the number of samples.
        squares: the squared norms of the gradients of each sample's share of the loss, ``[n]``, by parameter.
        norms: the norms of the batch's gradients that layers' factors give for less than reading the gradient costs.
        shared: parameters of several layers.
    """

    def __init__(self, model: nn.Module):
        uses = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
        self.n, self.shared = 0, {p for p, count in uses.items() if count > 1}
        self.squares: dict[Tensor, Tensor] = {}
        self.norms: dict[Tensor, Tensor] = {}
        self.factors: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self.small: dict[Any, list[tuple[Any, Tensor, Tensor]]] = defaultdict(list)
        self.fastest = Fastest()

    def finish(self) -> Tensor:
        """All squared norms, ``[parameters, n]``, after those of small layers, which have waited for others of their size."""
        for calls in self.small.values():
            modules, xs, gs = zip(*calls, strict=True)
            of_x, of_g = (squared(torch.stack(several)) for several in (xs, gs))
            self.squares.update(zip([module.weight for module in modules], of_x * of_g, strict=True))
            biases = zip([module.bias for module in modules], of_g, strict=True)
            self.squares.update((bias, squares) for bias, squares in biases if bias is not None)
        self.small.clear()
        return torch.stack([*self.squares.values()])


# Layers: what each keeps of its forward, and its parameters' squared norms


@singledispatch
def kept(module: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, ...]:
    return (x,)


@kept.register
def _(module: nn.LayerNorm, x: Tensor, output: Tensor) -> tuple[Tensor, ...]:
    return x, saved(output.grad_fn, "mean"), saved(output.grad_fn, "scale")


@singledispatch
def layer(module: Any, sums: Sums, x: Tensor, g: Tensor) -> None:
    """Everything else: transformers' Conv1D, a linear layer whose weight is ``[in, out]``."""
    sums.squares[module.weight] = sums.fastest((x.shape, g.shape), of_matrices(x, g))
    sums.squares[module.bias] = squared(g.sum(1))


@layer.register
def _(module: nn.Linear, sums: Sums, x: Tensor, g: Tensor) -> None:
    if x.dim() == 2:  # one position
        at_one_position(module, sums, x, g)
        return
    x, g = x.flatten(1, -2), g.flatten(1, -2)
    if module.weight in sums.shared:
        sums.factors[module.weight] = x, g
    sums.squares[module.weight] = sums.fastest((x.shape, g.shape), of_matrices(x, g))
    if module.bias is not None:
        sums.squares[module.bias] = squared(g.sum(1))


def at_one_position(module: nn.Linear, sums: Sums, x: Tensor, g: Tensor) -> None:
    if x.numel() <= SMALL:
        sums.small[x.shape, g.shape].append((module, x, g))
        return
    of_g = squared(g)
    if module.bias is not None:
        sums.squares[module.bias] = of_g
    sums.squares[module.weight] = squared(x) * of_g
    (n, i), o = x.shape, g.shape[1]
    if i * o > 2**16 and n**2 * (i + o) <= 8 * i * o:
        sums.norms[module.weight] = (x @ x.T).mul_(g @ g.T).sum().sqrt()


@layer.register
def _(module: nn.Conv2d, sums: Sums, x: Tensor, g: Tensor) -> None:
    settings = module.weight.shape, module.stride, module.padding, module.dilation, module.groups
    form = Convolution(x[:, None], g[:, None], *settings)
    sums.squares[module.weight] = sums.fastest((x.shape, g.shape, *settings), of_convolution(form))
    if module.bias is not None:
        sums.squares[module.bias] = squared(g.sum((2, 3)))


@layer.register
def _(module: nn.BatchNorm2d, sums: Sums, x: Tensor, g: Tensor) -> None:
    mean, variance = module.running_mean, module.running_var
    if g[0, 0].numel() >= REGISTER:
        weight, bias = of_channels(g, x, mean, variance, module.eps)
    else:
        along, bias = torch.linalg.vecdot(x.flatten(2), g.flatten(2)), g.sum((2, 3))
        weight = (along - mean * bias) * (variance + module.eps).rsqrt()
    sums.squares[module.weight], sums.squares[module.bias] = squared(weight), squared(bias)


@layer.register
def _(module: nn.LayerNorm, sums: Sums, x: Tensor, mean: Tensor, scale: Tensor, g: Tensor) -> None:
    both = sums.fastest((nn.LayerNorm, x.shape), of_features(g, x, mean, scale))
    sums.squares[module.weight], sums.squares[module.bias] = map(squared, both.chunk(2, 1))


@layer.register
def _(module: nn.Embedding, sums: Sums, ids: Tensor, g: Tensor) -> None:
    """Sums over equal ids; the product with the gradient of a linear layer of the same weight is ``(a_s . g_t) h_s[id_t]``."""
    n, t, width = g.shape
    ids = ids.expand(n, t).contiguous()
    places = torch.searchsorted(ids.sort(1).values, ids) + torch.arange(0, n * t, t)[:, None]
    rows = g.new_zeros(n * t, width).index_add_(0, places.flatten(), g.flatten(0, 1))
    found = squared(rows.view(n, -1))
    if module.weight in sums.factors:
        a, h = sums.factors.pop(module.weight)
        cross = (a @ g.mT).mul_(h.gather(2, ids[:, None].expand(-1, h.shape[1], -1)))
        found += sums.squares[module.weight] + 2 * cross.sum((1, 2))
    sums.squares[module.weight] = found


LSTM_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def lstm_layer(weights: Mapping[str, Tensor], sums: Sums, node: Any, grads: tuple[Tensor | None, ...]) -> None:
    """A layer whose states begin with zeros, from the gates and gradients that oneDNN has left in the workspace of its node."""
    (i, f, u, o), left, g = gates_in_workspace(node).unbind(2), left_by_backward(node), grads[0]
    before = F.pad(left.cells, (0, 0, 0, 0, 1, 0))
    tanh = torch.addcmul(i * u, f, before).tanh_()
    dh = torch.cat([g[:-1] + left.to_hidden[1:], g[-1:]])
    dc = dh * o * (1 - tanh * tanh)
    dc[:-1] += left.to_cell[1:]
    parts = (dc * u * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - u * u), dh * tanh * o * (1 - o))
    dz = torch.stack([part.transpose(0, 1) for part in parts], 2).flatten(2)
    x, hidden = (value.transpose(0, 1) for value in (saved(node, "input"), saved(node, "output")))
    gram = dz @ dz.mT
    for name, a in (("weight_ih", x), ("weight_hh", F.pad(hidden[:, :-1], (0, 0, 1, 0)))):
        sums.squares[weights[name]] = (a @ a.mT).mul_(gram).sum((1, 2))
    sums.squares[weights["bias_ih"]] = sums.squares[weights["bias_hh"]] = squared(dz.sum(1))


class OfPositionsFirst(nn.Linear):
    """A layer inside of torch's attention, where positions come before samples, or rows are positions of samples."""


@layer.register
def _(module: OfPositionsFirst, sums: Sums, x: Tensor, g: Tensor) -> None:
    x, g = (value.reshape(-1, sums.n, value.shape[-1]).transpose(0, 1) for value in (x, g))
    sums.squares[module.weight] = sums.fastest((OfPositionsFirst, x.shape, g.shape), of_matrices(x, g))
    sums.squares[module.bias] = squared(g.sum(1))


class SelfAttention(nn.Module):
    """torch's attention by hand, with torch's own operations in torch's order: its projections are layers that can be hooked."""

    batch_first = True

    def __init__(self, of: nn.MultiheadAttention):
        super().__init__()
        self.heads = of.num_heads
        self.projection, self.out = (OfPositionsFirst(1, 1, device="meta") for _ in range(2))
        self.projection.weight, self.projection.bias = of.in_proj_weight, of.in_proj_bias
        self.out.weight, self.out.bias = of.out_proj.weight, of.out_proj.bias

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        n, t, width = x.shape
        packed = self.projection(x.transpose(1, 0)).unflatten(-1, (3, width)).unsqueeze(0).transpose(0, -2)
        packed = packed.squeeze(-2).contiguous()
        each = [packed[i].view(t, n * self.heads, -1).transpose(0, 1).view(n, self.heads, t, -1) for i in range(3)]
        found = F.scaled_dot_product_attention(*each).permute(2, 0, 1, 3).reshape(n * t, width)
        return self.out(found).view(t, n, width).transpose(1, 0), None


# Hooks


def on_output(sums: Sums, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(module, nn.LSTM):
        hang_on_layers(sums, module, output[0])
        return output
    if isinstance(module, nn.Embedding) and len(output) == 1:  # of positions, which all samples share
        output = output.expand(sums.n, *output.shape[1:])
    output.register_hook(partial(on_gradient, module, sums, [*kept(module, args[0].detach(), output)]))
    return output


def on_gradient(module: nn.Module, sums: Sums, factors: list[Tensor], g: Tensor) -> None:
    layer(module, sums, *factors, g)
    factors.clear()  # Their memory is free for what follows, as in a plain step; the graph holds this hook for longer.


def hang_on_layers(sums: Sums, module: nn.LSTM, output: Tensor) -> None:
    """Hang a hook on the node of each layer, from the last layer to the first."""
    node, number = output.grad_fn, module.num_layers - 1
    while number >= 0:
        if node.name() == KIND:
            weights = {name: getattr(module, f"{name}_l{number}") for name in LSTM_WEIGHTS}
            node.register_hook(partial(after_lstm_layer, weights, sums))
            number -= 1
        node = node.next_functions[0][0]


def after_lstm_layer(weights: Mapping[str, Tensor], sums: Sums, _: object, grads: tuple[Tensor | None, ...]) -> None:
    lstm_layer(weights, sums, current_node(), grads)


def hung(model: nn.Module) -> Sums:
    """The sums that a model's hooks fill in from now on; its attention is replaced."""
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.MultiheadAttention):
                setattr(parent, name, SelfAttention(child))
    sums = Sums(model)
    for module in model.modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(partial(on_output, sums))
    return sums


# Steps


def loop_bound(model: nn.Module, loss_fn: Loss) -> Step:
    """A plain step with the squared norms of each sample's gradients and the norms of the batch's."""
    names = {p: name for name, p in model.named_parameters()}
    sums = hung(model)

    def step(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        sums.n = len(inputs)
        loss_fn(model(inputs), targets).backward()
        torch._foreach_norm([p.grad for p in names if p not in sums.norms])
        return named_traces(names, sums)

    return step


def function_bound(model: nn.Module, loss_fn: Loss) -> Step:
    """The squared norms of each sample's gradients, without the batch's gradients."""
    names = {p: name for name, p in model.named_parameters()}
    pass_to_first_layers = bare(model, loss_fn)
    sums = hung(model)

    def step(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        sums.n = len(inputs)
        pass_to_first_layers(inputs, targets)
        return named_traces(names, sums)

    return step


def named_traces(names: Mapping[Tensor, str], sums: Sums) -> dict[str, Tensor]:
    """The traces ``1/N sum_n ||N g_n||^2`` for a loss that averages, in which each sample's share is ``g_n``."""
    traces = sums.finish().sum(1).mul_(sums.n)
    return dict(zip([names[p] for p in sums.squares], traces.unbind(), strict=True))
