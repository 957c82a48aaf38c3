"""Raw parameters, weights that are computed from others, tied and masked ones, and gates at zero."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, weight_norm

from fuzz.model import Part, Site
from fuzz.registry import piece


@piece()
def matmul(s: Site) -> Part:
    return Part(lambda m, h: h @ m.w + h @ m.w.T, w=s.parameter(s.width, s.width))


@piece()
def functional_linear(s: Site) -> Part:
    flip = s.choice(True, False)
    return Part(lambda m, h: F.linear(h, m.l.weight.t() if flip else m.l.weight, m.l.bias), l=s.linear())


@piece()
def einsum(s: Site) -> Part:
    how = s.choice("ntd,de->nte", "ntd,ed->nte", "ntd,dd->ntd")
    return Part(lambda m, h: torch.einsum(how, h, m.w), w=s.parameter(s.width, s.width))


@piece()
def einsum_of_heads(s: Site) -> Part:
    return Part(lambda m, h: torch.einsum("ntd,kde->ntke", h, m.w).sum(2), w=s.parameter(2, s.width, s.width))


@piece()
def einsum_over_stacked_layers(s: Site) -> Part:
    return Part(lambda m, h: torch.einsum("lntd,l->ntd", torch.stack([h, h.tanh()]), m.w), w=s.parameter(2))


@piece()
def stacked_layers_with_batch_inside(s: Site) -> Part:
    def f(m: Part, h: torch.Tensor) -> torch.Tensor:
        return torch.einsum("lbtd,sd->slbt", torch.stack([h, h.tanh()]), m.l(m.w)).sum(1).permute(1, 2, 0)

    return Part(f, w=s.parameter(s.width, s.width), l=s.linear())


@piece()
def computed_weight(s: Site) -> Part:
    how = s.choice(lambda w: w.softmax(0), lambda w: w * w.abs(), F.softplus, lambda w: w / w.norm())
    return Part(lambda m, h: h @ how(m.w), w=s.parameter(s.width, s.width))


@piece()
def parametrized(s: Site) -> Part:
    wrap = s.choice(weight_norm, orthogonal)
    return Part(lambda m, h: m.l(h), l=wrap(nn.Linear(s.width, s.width)))


@piece()
def pruned(s: Site) -> Part:
    layer = nn.Linear(s.width, s.width)
    prune.l1_unstructured(layer, "weight", 0.5)
    layer(torch.zeros(1, s.width))
    return Part(lambda m, h: m.l(h), l=layer)


@piece()
def vector(s: Site) -> Part:
    shape = s.choice((), (s.width,), (1, 1, s.width), (s.places, 1), (s.places, s.width))
    how = s.choice(
        lambda h, p: h * p,
        lambda h, p: h + p,
        lambda h, p: h * p.exp(),
        lambda h, p: torch.addcmul(h, h, p),
        lambda h, p: torch.where(h > 0, h, h * p),
        lambda h, p: torch.lerp(h, h.tanh(), p),
    )
    return Part(lambda m, h: how(h, m.p), p=s.parameter(*shape))


@piece()
def gate_at_zero(s: Site) -> Part:
    gate = nn.Parameter(torch.zeros(s.choice((), (1,), (s.width,))))
    return Part(lambda m, h: h + m.g * m.l(h), g=gate, l=s.linear())


@piece()
def raw_gate_at_zero(s: Site) -> Part:
    own = {"g": nn.Parameter(torch.zeros(())), "w": s.parameter(s.width, s.width)}
    return Part(lambda m, h: h + m.g * (h @ m.w), **own)


@piece()
def lora_at_zero(s: Site) -> Part:
    own = {"a": s.parameter(2, s.width), "b": nn.Parameter(torch.zeros(s.width, 2)), "l": s.linear()}
    return Part(lambda m, h: m.l(h) + h @ m.a.T @ m.b.T, **own)


@piece()
def dead_units(s: Site) -> Part:
    layer = nn.Linear(s.width, s.width)
    nn.init.constant_(layer.bias, s.choice(-5.0, -0.3))
    return Part(lambda m, h: h + m.k(F.relu(m.l(h))), l=layer, k=nn.Linear(s.width, s.width))


@piece()
def tied(s: Site) -> Part:
    words = nn.Embedding(7, s.width)

    def f(m: Part, h: torch.Tensor) -> torch.Tensor:
        z = h + m.e((h.detach()[..., 0] * 9).long().abs() % 7)
        return z + F.linear(z, m.e.weight).softmax(-1) @ m.e.weight

    return Part(f, e=words)


@piece()
def parts_of_a_weight(s: Site) -> Part:
    half = s.width // 2
    own = {"w": s.parameter(s.width, s.width)}
    return Part(lambda m, h: torch.cat([h @ m.w[:, :half], h.tanh() @ m.w[:, half:]], -1), **own)


@piece()
def overlapping_parts(s: Site) -> Part:
    own = {"w": s.parameter(s.width, s.width)}
    return Part(lambda m, h: F.pad(h @ m.w[:, :-1], (0, 1)) + F.pad(h @ m.w[:, 1:], (1, 0)), **own)


@piece()
def unused(s: Site) -> Part:
    return Part(lambda m, h: h.sin(), l=nn.Linear(s.width, s.width), p=s.parameter(2))


@piece()
def without_elements(s: Site) -> Part:
    return Part(lambda m, h: h + m.p.sum(), p=nn.Parameter(torch.zeros(0, s.width)))


@piece()
def mapped(s: Site) -> Part:
    return Part(lambda m, h: torch.vmap(lambda z: z @ m.w)(h), w=s.parameter(s.width, s.width))


@piece()
def hypernetwork(s: Site) -> Part:
    own = {"l": nn.Linear(3, s.width), "z": nn.Buffer(torch.randn(s.width, 3))}
    return Part(lambda m, h: F.linear(h, m.l(m.z)), **own)
