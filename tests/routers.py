"""Mixtures of experts whose router orders anew in each step, and what a loop over samples says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_secorder import FisherMonitor

N, T, WIDTH, EXPERTS = 4, 6, 5, 3
CAPACITY = 7
STEPS = 8  # of which passes look at the 1st, 2nd, 3rd and 5th
LOOKED_AT = [1, 2, 3, 5]


class Mixture(nn.Module):
    """Attention, then experts that get the tokens that a router sends them, and a shared expert."""

    def __init__(self, route: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.router, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 2)
        self.qkv, self.shared = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = (nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH)) for _ in range(2))
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS)])
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for _ in range(2):
            q, k, v = self.qkv(h).unflatten(2, (3, 1, WIDTH)).permute(2, 0, 3, 1, 4)
            h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            tokens = F.layer_norm(h, (WIDTH,)).flatten(0, 1)
            h = h + (self.route(self, tokens) + self.shared(tokens)).view_as(h)
        return self.head(h)


def eager(self: Any, tokens: Tensor) -> Tensor:
    """Each token to its two best experts, in a loop over these; one expert may have none."""
    weights, chosen = self.router(tokens).softmax(-1).topk(2, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(tokens)
    for number, expert in enumerate(self.experts):
        row, place = torch.where(chosen == number)
        own = expert(tokens[None, row].reshape(-1, WIDTH)).tanh() * weights[row, place, None]
        out.index_add_(0, row, own)
    return out


def in_order_of_experts(self: Any, tokens: Tensor) -> Tensor:
    """Pairs of tokens and experts, sorted by expert, through a stack of matrices, and back; a scale for all rows."""
    weights, chosen = self.router(tokens).topk(2, -1)
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=EXPERTS).tolist()
    rows = (tokens[order // 2] * self.scale).split(counts)
    made = torch.cat([part @ up @ down for part, up, down in zip(rows, self.up, self.down, strict=True)])
    made = made * weights.softmax(-1).flatten()[order][:, None]
    return torch.zeros_like(tokens).index_add(0, order // 2, made)


def back_by_an_index(self: Any, tokens: Tensor) -> Tensor:
    """The same, but put back in order and added up by token."""
    weights, chosen = self.router(tokens).softmax(-1).topk(2, -1)
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=EXPERTS).tolist()
    parts = zip(tokens.index_select(0, order // 2).split(counts), self.experts, strict=True)
    made = torch.cat([expert(part) for part, expert in parts])[order.argsort()]
    return (made.view(-1, 2, WIDTH) * weights[:, :, None]).sum(1)


def with_capacity(self: Any, tokens: Tensor) -> Tensor:
    """Each token to its best expert, which takes so many; the rest is dropped, and places may stay empty."""
    weights, chosen = self.router(tokens).softmax(-1).max(-1)
    taken = F.one_hot(chosen, EXPERTS)
    place = ((taken.cumsum(0) - 1) * taken).sum(1)
    kept = place < CAPACITY
    slot = (chosen * CAPACITY + place)[kept]
    places = tokens.new_zeros(EXPERTS * CAPACITY, WIDTH).index_copy(0, slot, tokens[kept])
    made = places.view(EXPERTS, CAPACITY, WIDTH).bmm(self.up).tanh().flatten(0, 1)
    out = torch.zeros_like(tokens)
    out[kept] = made[slot] * weights[kept, None]
    return out


def by_scatter(self: Any, tokens: Tensor) -> Tensor:
    """Each expert chooses its tokens, and some tokens are nobody's."""
    weights, row = self.router(tokens).softmax(-1).topk(CAPACITY, 0)
    parts = [expert(tokens[row[:, number]]) for number, expert in enumerate(self.experts)]
    made = torch.cat(parts) * weights.t().reshape(-1, 1)
    index = row.t().reshape(-1, 1).expand(-1, WIDTH)
    return torch.zeros_like(tokens).scatter_add(0, index, made)


def masked(self: Any, tokens: Tensor) -> Tensor:
    """Tokens that a mask picks for each expert."""
    chosen, out = self.router(tokens).argmax(-1), torch.zeros_like(tokens)
    for number, expert in enumerate(self.experts):
        out[chosen == number] = expert(tokens[chosen == number])
    return out + 0 * self.router(tokens).sum(-1, keepdim=True)


class Multiplier(torch.autograd.Function):
    """The weights of chosen experts; all scores get a gradient, as if the choice had been a little further away."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(weights, chosen, scores.softmax(-1))
        return weights * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, chosen, gates = ctx.saved_tensors
        scores = -gates * (grad * weights).sum(-1, keepdim=True)
        return scores.scatter_add(-1, chosen, grad * weights), grad, None


def by_parts(self: Any, tokens: Tensor) -> Tensor:
    """Each expert's part is written into one buffer, of which the parts' sizes change; its weights are a function's."""
    scores = self.router(tokens)
    weights, chosen = scores.softmax(-1).topk(1, -1)
    weights = Multiplier.apply(scores, weights, chosen)
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=EXPERTS).tolist()
    made, start = torch.zeros_like(tokens), 0
    for count, expert in zip(counts, self.experts, strict=True):
        made[start : start + count] = expert(tokens[order[start : start + count]]).tanh()
        start += count
    halves = torch.empty_like(made)
    halves[:, : WIDTH // 2], halves[:, WIDTH // 2 :] = made[:, : WIDTH // 2], made[:, WIDTH // 2 :] * 2
    return halves[order.argsort()] * weights


ROUTES = [eager, in_order_of_experts, back_by_an_index, with_capacity, by_scatter, masked, by_parts]


def made(route: Callable[..., Tensor]) -> Mixture:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixture(route).double()
        nn.init.normal_(model.router.weight, std=2.0)
        nn.init.zeros_(model.router.bias)
        return model


def batch(step: int) -> Tensor:
    return torch.randn(N, T, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum((1, 2))


def by_a_loop(model: nn.Module) -> dict[str, Tensor]:
    """The squared norms of all samples' gradients, in float64, from the gradient of each sample's loss alone."""
    rows = []
    for step in range(1, STEPS + 1):
        for loss in losses_of(model, batch(step)):
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
            rows.append(torch.stack([loss.new_zeros(()) if g is None else g.square().sum() for g in grads]))
    return dict(zip(dict(model.named_parameters()), torch.stack(rows).T, strict=True))


def squared_norms(monitor: FisherMonitor) -> dict[str, Tensor]:
    """The same as a monitor found them."""
    table = monitor.per_sample
    return {name: torch.from_numpy(table[name].to_numpy(copy=True)) for name in table}


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        # In float64 the sums' order makes a difference of some ten units in the last place.
        torch.testing.assert_close(
            found[name], values, rtol=1e-10, atol=1e-20, msg=lambda text, name=name: f"{name}: {text}"
        )
