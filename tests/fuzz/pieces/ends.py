"""Stems, which take the model's input, and heads, which give its outputs."""

from __future__ import annotations

import torch
from torch import nn

from fuzz.model import Part, Site
from fuzz.registry import head, stem


@stem()
def plain(s: Site) -> Part:
    return Part(lambda m, x: x)


@stem()
def projected(s: Site) -> Part:
    return Part(lambda m, x: m.l(x), l=nn.Linear(s.width, s.width))


@stem()
def words(s: Site) -> Part:
    words = nn.Embedding(9, s.width, padding_idx=s.choice(None, 0), scale_grad_by_freq=False)
    return Part(lambda m, x: m.e((x[..., 0] * 4).long().abs() % 9), e=words)


@stem()
def images(s: Site) -> Part:
    return Part(lambda m, x: m.c(x[:, None]).mean(1).tanh(), c=nn.Conv2d(1, 3, 3, padding=1))


@stem()
def videos(s: Site) -> Part:
    cube = nn.Conv3d(1, 2, (1, 3, 1), padding=(0, 1, 0), bias=s.choice(True, False))
    return Part(lambda m, x: m.c(x[:, None, :, :, None]).flatten(3).mean(1), c=cube)


@head("pooled")
def mean_of_places(s: Site) -> Part:
    return Part(lambda m, h: m.l(h.mean(1)), l=nn.Linear(s.width, 3))


@head("pooled")
def one_place(s: Site) -> Part:
    return Part(lambda m, h: m.l(h[:, m.at]), l=nn.Linear(s.width, 3), at=s.choice(0, -1))


@head("pooled")
def flattened(s: Site) -> Part:
    return Part(lambda m, h: m.l(h.flatten(1)), l=nn.Linear(s.width * s.places, 3))


@head("pooled")
def maximum(s: Site) -> Part:
    return Part(lambda m, h: m.l(h).amax(1), l=nn.Linear(s.width, 3, bias=False))


@head("tokens")
def every_place(s: Site) -> Part:
    return Part(lambda m, h: m.l(h), l=nn.Linear(s.width, 3))


@head("tokens")
def scaled_similarity(s: Site) -> Part:
    own = {"w": s.parameter(3, s.width), "t": nn.Parameter(torch.tensor(0.5))}
    return Part(lambda m, h: m.t.exp() * torch.nn.functional.normalize(h, dim=-1) @ m.w.T, **own)


@head("both")
def named_outputs(s: Site) -> Part:
    own = {"l": nn.Linear(s.width, 3), "k": nn.Linear(s.width, 3)}
    return Part(lambda m, h: {"logits": m.l(h.mean(1)), "tokens": m.k(h)}, **own)
