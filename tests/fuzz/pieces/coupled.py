"""What mixes samples: the right outcome is a refusal, or what autograd gives for a sample's share of the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fuzz.model import Part, Site
from fuzz.registry import piece


@piece(coupled=True)
def batch_mean(s: Site) -> Part:
    strength = s.choice(1.0, 0.1, 1e-3)
    return Part(lambda m, h: (z := m.l(h)) - strength * z.mean(0), l=s.linear())


@piece(coupled=True)
def batch_statistics_by_hand(s: Site) -> Part:
    return Part(lambda m, h: ((z := m.l(h)) - z.mean(0)) / (z.std(0, correction=0) + 0.1), l=s.linear())


@piece(coupled=True)
def softmax_over_the_batch(s: Site) -> Part:
    return Part(lambda m, h: h + m.l(h).softmax(0), l=s.linear())


@piece(coupled=True)
def attention_over_the_batch(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        return torch.einsum("nk,ktd->ntd", (h.flatten(1) @ h.flatten(1).T).softmax(1), m.l(h))

    return Part(f, l=s.linear())


@piece(coupled=True)
def batch_norm_in_training(s: Site) -> Part:
    norm = nn.BatchNorm1d(s.width, affine=s.choice(True, False), track_running_stats=False)
    return Part(lambda m, h: m.n(m.l(h).mT).mT, l=s.linear(), n=norm)


@piece(coupled=True)
def recurrence_over_the_batch(s: Site) -> Part:
    layer = s.choice(nn.LSTM, nn.GRU, nn.RNN)(s.width, s.width)
    return Part(lambda m, h: m.r(h)[0], r=layer)


@piece(coupled=True)
def attention_that_takes_samples_for_places(s: Site) -> Part:
    return Part(lambda m, h: m.a(h, h, h, need_weights=False)[0], a=nn.MultiheadAttention(s.width, 2))


@piece(coupled=True)
def causal_sum_over_the_batch(s: Site) -> Part:
    return Part(lambda m, h: m.l(h).cumsum(0), l=s.linear())


@piece(coupled=True)
def neighbor_in_the_batch(s: Site) -> Part:
    return Part(lambda m, h: m.l(h) + m.l(h).roll(1, 0).tanh(), l=s.linear())


@piece(coupled=True)
def largest_of_the_batch(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        z = m.l(h)
        return z - z.amax(0)

    return Part(f, l=s.linear())


@piece(coupled=True)
def encoder_that_takes_samples_for_places(s: Site) -> Part:
    return Part(lambda m, h: m.e(h), e=nn.TransformerEncoderLayer(s.width, 2, 5, 0.0))
