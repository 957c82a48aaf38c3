"""Rows that go their own ways: experts, sorting, gathering, scattering, masks.

What decides is a single number of h, not a sum that a norm may have made zero up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fuzz.model import Part, Site
from fuzz.registry import piece


def sorted_by(how: object) -> object:
    """A piece that puts the samples in another order, applies a layer and puts them back, twice."""

    def make(s: Site) -> Part:
        def f(m: Part, h: Tensor) -> Tensor:
            order = h.detach()[:, 0, 0].argsort()
            z = how(m.l(how(h, order)).tanh(), order.argsort())
            return h + how(m.l(how(z, order)).tanh(), order.argsort())

        return Part(f, l=s.linear())

    return make


@piece()
def sort_by_index(s: Site) -> Part:
    return sorted_by(lambda h, o: h[o])(s)


@piece()
def sort_by_index_select(s: Site) -> Part:
    return sorted_by(lambda h, o: h.index_select(0, o))(s)


@piece()
def sort_by_gather(s: Site) -> Part:
    return sorted_by(lambda h, o: h.gather(0, o[:, None, None].expand_as(h)))(s)


@piece()
def sort_by_select_and_stack(s: Site) -> Part:
    return sorted_by(lambda h, o: torch.stack([h[int(i)] for i in o]))(s)


@piece()
def sort_by_split_and_cat(s: Site) -> Part:
    return sorted_by(lambda h, o: torch.cat([h.split(1)[int(i)] for i in o]))(s)


@piece()
def sort_by_embedding(s: Site) -> Part:
    return sorted_by(lambda h, o: F.embedding(o, h.flatten(1)).view(h.shape))(s)


@piece()
def sort_by_matrix(s: Site) -> Part:
    return sorted_by(lambda h, o: (torch.eye(len(o), dtype=h.dtype)[o] @ h.flatten(1)).view(h.shape))(s)


@piece()
def sort_by_index_copy(s: Site) -> Part:
    return sorted_by(lambda h, o: torch.zeros_like(h).index_copy(0, o.argsort(), h))(s)


@piece()
def sort_by_scatter(s: Site) -> Part:
    return sorted_by(lambda h, o: torch.zeros_like(h).scatter(0, o.argsort()[:, None, None].expand_as(h), h))(s)


@piece()
def sort_by_scatter_reduce(s: Site) -> Part:
    def how(h: Tensor, o: Tensor) -> Tensor:
        return torch.zeros_like(h).scatter_reduce(0, o.argsort()[:, None, None].expand_as(h), h, "sum")

    return sorted_by(how)(s)


@piece()
def sort_by_take(s: Site) -> Part:
    def how(h: Tensor, o: Tensor) -> Tensor:
        return h.take(torch.arange(h.numel()).view(len(h), -1)[o]).view(h.shape)

    return sorted_by(how)(s)


@piece()
def sort_by_second_axis(s: Site) -> Part:
    return sorted_by(lambda h, o: h.transpose(0, 1)[:, o].transpose(0, 1))(s)


@piece()
def routed_samples(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        k = h.detach()[:, 0, 0] > 0
        out = torch.zeros_like(h)
        out[k] = m.a(h[k]).to(h.dtype)
        out[~k] = m.b(h[~k]).to(h.dtype)
        return out

    return Part(f, a=s.linear(), b=nn.Linear(s.width, s.width))


@piece()
def routed_tokens(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        z = h.flatten(0, 1)
        k = (z.detach()[:, 0] * 10).long().abs() % len(m.e)
        out = torch.zeros_like(z)
        for i, layer in enumerate(m.e):
            rows = (k == i).nonzero()[:, 0]
            out = out.index_add(0, rows, layer(z[rows]).to(z.dtype))
        return out.view(h.shape)

    return Part(f, e=nn.ModuleList(nn.Linear(s.width, s.width) for _ in range(3)))


@piece()
def top_of_experts(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        z = h.flatten(0, 1)
        weight, which = m.r(z).softmax(-1).topk(m.k)
        out = torch.zeros_like(z)
        for i, layer in enumerate(m.e):
            rows, slot = torch.where(which == i)
            out.index_add_(0, rows, (layer(z[rows]) * weight[rows, slot, None]).to(z.dtype))
        return out.view(h.shape)

    layers = nn.ModuleList(nn.Linear(s.width, s.width) for _ in range(3))
    return Part(f, r=nn.Linear(s.width, 3, bias=False), e=layers, k=s.choice(1, 2))


@piece()
def experts_by_weight(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        return torch.einsum("ntd,ntde->nte", h, m.w[(h.detach()[..., 0] * 10).long().abs() % 3])

    return Part(f, w=s.parameter(3, s.width, s.width))


@piece()
def router_over_one_expert(s: Site) -> Part:
    return Part(lambda m, h: m.r(h).softmax(-1) * m.l(h), r=nn.Linear(s.width, 1), l=s.linear())


@piece()
def masked_places(s: Site) -> Part:
    return Part(lambda m, h: m.l(h).masked_fill((h.detach()[..., :1] < 0), 0.0), l=s.linear())


@piece()
def masked_select(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        keep = (h.detach()[..., :1] > 0).expand_as(h)
        return torch.zeros_like(h).masked_scatter(keep, m.l(h).masked_select(keep).to(h.dtype))

    return Part(f, l=s.linear())


@piece()
def tokens_without_padding(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        keep = h.detach()[..., 0] > 0
        out = torch.zeros_like(h)
        out[keep] = m.l(h[keep]).to(h.dtype)
        return out

    return Part(f, l=s.linear())


@piece()
def samples_with_a_closed_gate(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        return h + m.l(h) * (h.detach()[:, :1, :1] > 0)

    return Part(f, l=s.linear())


@piece()
def first_of_every_sample(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        best = h.detach()[..., 0].argmax(1)
        return h + m.l(h.gather(1, best[:, None, None].expand(-1, 1, h.shape[2])))

    return Part(f, l=s.linear())


@piece()
def choice_by_sample(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        return torch.where(h.detach()[:, :1, :1] > 0, m.a(h), m.b(h).tanh())

    return Part(f, a=s.linear(), b=s.linear())
