"""Recurrent layers and cells."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from fuzz.model import Part, Site
from fuzz.registry import piece


@piece()
def recurrent(s: Site) -> Part:
    two, first, kind = s.choice(True, False), s.choice(True, False), s.choice(nn.LSTM, nn.GRU, nn.RNN)
    size, layers = s.width // 2 if two else s.width, s.choice(1, 2)
    layer = kind(s.width, size, layers, batch_first=first, bidirectional=two, bias=s.choice(True, False))
    return Part(lambda m, h: m.r(h)[0] if first else m.r(h.transpose(0, 1))[0].transpose(0, 1), r=layer)


@piece()
def last_state(s: Site) -> Part:
    two, first, kind = s.choice(True, False), s.choice(True, False), s.choice(nn.LSTM, nn.GRU)
    layer = kind(s.width, s.width, s.choice(1, 2), batch_first=first, bidirectional=two)

    def f(m: Part, h: Tensor) -> Tensor:
        state = m.r(h if first else h.transpose(0, 1))[1]
        return h + (state[0] if isinstance(state, tuple) else state)[-1][:, None]

    return Part(f, r=layer)


@piece()
def projected_lstm(s: Site) -> Part:
    return Part(lambda m, h: m.r(h)[0], r=nn.LSTM(s.width, s.width + 1, proj_size=s.width, batch_first=True))


@piece()
def learned_initial_state(s: Site) -> Part:
    own = {"r": nn.GRU(s.width, s.width, batch_first=True), "p": s.parameter(1, 1, s.width)}
    return Part(lambda m, h: m.r(h, m.p.expand(-1, len(h), -1).contiguous())[0], **own)


@piece()
def packed(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        lengths = ((h.detach()[:, 0, 0] * 10).long().abs() % h.shape[1] + 1).cpu()
        rows = nn.utils.rnn.pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
        return h + nn.utils.rnn.pad_packed_sequence(m.r(rows)[0], batch_first=True, total_length=h.shape[1])[0]

    return Part(f, r=s.choice(nn.LSTM, nn.GRU)(s.width, s.width, batch_first=True))


@piece()
def cell(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        states = itertools.accumulate(h.unbind(1), lambda z, x: m.c(x, z), initial=torch.zeros_like(h[:, 0]))
        return torch.stack(list(states)[1:], 1)

    return Part(f, c=s.choice(nn.GRUCell, nn.RNNCell)(s.width, s.width))
