"""What is the same for all samples until it meets the data: positions, tables, tokens, prompts, shared nodes."""

from __future__ import annotations

import torch
from torch import nn

from fuzz.model import Part, Site
from fuzz.registry import piece


@piece()
def positions(s: Site) -> Part:
    shape = s.choice((s.places,), (1, s.places))
    own = {"e": nn.Embedding(9, s.width), "i": nn.Buffer(torch.arange(s.places).view(shape))}
    return Part(lambda m, h: h + m.e(m.i), **own)


@piece()
def position_table(s: Site) -> Part:
    return Part(lambda m, h: h + m.e.weight[: h.shape[1]], e=nn.Embedding(9, s.width))


@piece()
def positions_as_a_gate(s: Site) -> Part:
    own = {"e": nn.Embedding(9, s.width)}
    return Part(lambda m, h: h * m.e(torch.arange(h.shape[1])).sigmoid() + m.e(torch.arange(h.shape[1])).tanh(), **own)


@piece()
def expanded_positions(s: Site) -> Part:
    own = {"e": nn.Embedding(9, s.width)}
    return Part(lambda m, h: h + m.e(torch.arange(h.shape[1]).expand(len(h), -1)), **own)


@piece()
def network_on_positions(s: Site) -> Part:
    own = {
        "f": nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, s.width)),
        "t": nn.Buffer(torch.randn(s.places, 2)),
    }
    return Part(lambda m, h: h + m.f(m.t), **own)


@piece()
def norm_on_positions(s: Site) -> Part:
    return Part(lambda m, h: h + m.n(m.p), p=s.parameter(s.places, s.width), n=nn.LayerNorm(s.width))


@piece()
def embedding_then_linear(s: Site) -> Part:
    own = {"e": nn.Embedding(9, s.width), "l": s.linear()}
    return Part(lambda m, h: h + m.l(m.e(torch.arange(h.shape[1]))), **own)


@piece()
def layer_on_a_parameter_and_the_data(s: Site) -> Part:
    return Part(lambda m, h: m.l(h) + m.l(m.p), p=s.parameter(s.places, s.width), l=s.linear())


@piece()
def class_token(s: Site) -> Part:
    def f(m: Part, h: torch.Tensor) -> torch.Tensor:
        z = m.l(torch.cat([m.p.expand(len(h), -1, -1), h], 1) + m.q)
        return z[:, 1:] + z[:, :1]

    return Part(f, p=s.parameter(1, 1, s.width), q=s.parameter(1, s.places + 1, s.width), l=s.linear())


@piece()
def prompt_through_a_layer(s: Site) -> Part:
    def f(m: Part, h: torch.Tensor) -> torch.Tensor:
        return m.l(torch.cat([m.k(m.p).expand(len(h), -1, -1), h], 1))[:, : h.shape[1]]

    return Part(f, p=s.parameter(2, s.width), l=s.linear(), k=nn.Linear(s.width, s.width))


@piece()
def queries(s: Site) -> Part:
    own = {"q": s.parameter(s.places, s.width), "l": s.linear()}
    return Part(lambda m, h: (m.l(m.q) @ h.mT).softmax(-1) @ h, **own)


@piece()
def relative_bias(s: Site) -> Part:
    i = torch.arange(s.places)
    own = {"e": nn.Embedding(2 * s.places, 1), "l": s.linear(), "i": nn.Buffer(i[:, None] - i + s.places)}
    return Part(lambda m, h: (h @ h.mT / 2 + m.e(m.i)[..., 0]).softmax(-1) @ m.l(h), **own)


@piece()
def convolution_on_a_parameter(s: Site) -> Part:
    own = {"p": s.parameter(1, s.width, s.places), "c": nn.Conv1d(s.width, s.width, 3, padding=1)}
    return Part(lambda m, h: h + m.c(m.p).mT, **own)


@piece()
def codebook(s: Site) -> Part:
    own = {"p": s.parameter(4, s.width), "l": s.linear()}
    return Part(lambda m, h: (h @ m.l(m.p).T).softmax(-1) @ m.l(m.p), **own)


@piece()
def graph_layer_on_shared_nodes(s: Site) -> Part:
    own = {
        "x": nn.Buffer(torch.randn(s.places, s.width)),
        "a": nn.Buffer(torch.rand(s.places, s.places)),
        "l": s.linear(),
    }
    return Part(lambda m, h: h + m.a @ m.l(m.x), **own)


@piece()
def recurrence_on_a_parameter(s: Site) -> Part:
    own = {"p": s.parameter(1, s.places, s.width), "r": nn.GRU(s.width, s.width, batch_first=True)}
    return Part(lambda m, h: h + m.r(m.p)[0], **own)


@piece()
def token_moved_behind_the_data(s: Site) -> Part:
    def f(m: Part, h: torch.Tensor) -> torch.Tensor:
        z = torch.cat([m.p.expand(len(h), -1, -1), h], 1) + m.e.weight[: h.shape[1] + 1]
        return m.l(torch.cat([z[:, 1:], z[:, :1]], 1))[:, 1:]

    return Part(f, p=s.parameter(1, 1, s.width), e=nn.Embedding(9, s.width), l=s.linear())
