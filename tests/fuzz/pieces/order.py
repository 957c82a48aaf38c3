"""Axes in other places: sequence-first, folded, windows, splits, stacks, sums along an axis."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fuzz.model import Part, Site
from fuzz.registry import piece


@piece()
def sequence_first(s: Site) -> Part:
    return Part(lambda m, h: m.l(h.transpose(0, 1)).transpose(0, 1), l=s.linear())


@piece()
def sequence_first_matmul(s: Site) -> Part:
    return Part(lambda m, h: (h.transpose(0, 1) @ m.w).tanh().transpose(0, 1), w=s.parameter(s.width, s.width))


@piece()
def folded(s: Site) -> Part:
    return Part(lambda m, h: m.l(h.flatten(0, 1)).view(h.shape), l=s.linear())


@piece()
def folded_time_outside(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        return m.l(h.transpose(0, 1).flatten(0, 1)).relu().view(h.shape[1], h.shape[0], -1).transpose(0, 1)

    return Part(f, l=s.linear())


@piece()
def windows(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        z = F.pad(h, (0, 0, 1, 1)).unfold(1, 3, 1).mT.flatten(0, 1)
        return m.l(z).view(*h.shape[:2], 3, -1).sum(2)

    return Part(f, l=s.linear())


@piece()
def channels_as_places(s: Site) -> Part:
    return Part(lambda m, h: h * F.linear(h.mT, m.w).mT.sigmoid(), w=s.parameter(s.places, s.places))


@piece()
def channels_first(s: Site) -> Part:
    return Part(lambda m, h: m.l(h.permute(2, 0, 1).permute(1, 2, 0)), l=s.linear())


@piece()
def split_and_cat(s: Site) -> Part:
    return Part(lambda m, h: torch.cat([m.l(part) for part in h.split(1, 1)], 1), l=s.linear())


@piece()
def select_and_stack(s: Site) -> Part:
    return Part(lambda m, h: torch.stack([m.l(h[:, t]) for t in range(h.shape[1])], 1), l=s.linear())


@piece()
def stack_in_front(s: Site) -> Part:
    return Part(lambda m, h: m.l(torch.stack([h, h.tanh()])).sum(0), l=s.linear())


@piece()
def copies_behind_the_batch(s: Site) -> Part:
    return Part(lambda m, h: m.l(h.repeat_interleave(2, 0)).unflatten(0, (-1, 2)).mean(1), l=s.linear())


@piece()
def copies_in_front_of_the_batch(s: Site) -> Part:
    return Part(lambda m, h: m.l(torch.cat([h, -h])).unflatten(0, (2, -1))[0], l=s.linear())


@piece()
def chunks_of_the_batch(s: Site) -> Part:
    return Part(lambda m, h: torch.cat([m.l(part) for part in h.chunk(2)]), l=s.linear())


@piece()
def samples_one_by_one(s: Site) -> Part:
    stacked = s.choice(True, False)
    return Part(
        lambda m, h: torch.stack([m.l(z) for z in h]) if stacked else torch.cat([m.l(z[None]) for z in h]), l=s.linear()
    )


@piece()
def along_time(s: Site) -> Part:
    how = s.choice(
        lambda h: h.cumsum(1),
        lambda h: h.flip(1),
        lambda h: h.roll(1, 1),
        lambda h: h.sort(1)[0],
        lambda h: h.repeat_interleave(2, 1)[:, ::2],
        lambda h: h.logcumsumexp(1),
        lambda h: h.transpose(0, 1).cumsum(0).transpose(0, 1),
    )
    return Part(lambda m, h: how(m.l(h)), l=s.linear())


@piece()
def mean_of_time(s: Site) -> Part:
    return Part(lambda m, h: h + m.l(h.mean(1, keepdim=True)).expand_as(h), l=s.linear())


@piece()
def reversed_batch(s: Site) -> Part:
    return Part(lambda m, h: m.l(h.flip(0)).flip(0), l=s.linear())


@piece()
def rolled_batch(s: Site) -> Part:
    return Part(lambda m, h: m.l(h.roll(1, 0)).roll(-1, 0), l=s.linear())


@piece()
def as_strided_view(s: Site) -> Part:
    return Part(lambda m, h: m.l(h.contiguous().as_strided(h.shape, h.contiguous().stride())), l=s.linear())


@piece()
def squeezed_places(s: Site) -> Part:
    return Part(lambda m, h: h + m.l(h[:, :1].squeeze(1)).unsqueeze(1), l=s.linear())
