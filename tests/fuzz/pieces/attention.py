"""Attention by the layers of torch and by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fuzz.model import Part, Site
from fuzz.registry import piece


@piece()
def multihead_attention(s: Site) -> Part:
    first, bias_kv = s.choice(True, False), s.choice(True, False)
    layer = nn.MultiheadAttention(s.width, 2, batch_first=first, add_bias_kv=bias_kv, bias=s.choice(True, False))

    def f(m: Part, h: Tensor) -> Tensor:
        z = h if first else h.transpose(0, 1)
        out = m.a(z, z, z, need_weights=False)[0]
        return out if first else out.transpose(0, 1)

    return Part(f, a=layer)


@piece()
def masked_attention(s: Site) -> Part:
    first = s.choice(True, False)

    def f(m: Part, h: Tensor) -> Tensor:
        z = h if first else h.transpose(0, 1)
        skip = h.detach()[..., 0] < 0
        skip[:, 0] = False
        out = m.a(z, z, z, key_padding_mask=skip)[0]
        return out if first else out.transpose(0, 1)

    return Part(f, a=nn.MultiheadAttention(s.width, 2, batch_first=first))


@piece()
def causal_attention(s: Site) -> Part:
    mask = nn.Buffer(torch.ones(s.places, s.places).triu(1).bool())
    own = {"a": nn.MultiheadAttention(s.width, 2, batch_first=True), "k": mask}
    return Part(lambda m, h: m.a(h, h, h, attn_mask=m.k, need_weights=False)[0], **own)


@piece()
def attention_to_queries(s: Site) -> Part:
    own = {"a": nn.MultiheadAttention(s.width, 2, batch_first=True), "q": s.parameter(1, s.places, s.width)}
    return Part(lambda m, h: m.a(m.q.expand(len(h), -1, -1), h, h)[0], **own)


@piece()
def encoder_layer(s: Site) -> Part:
    first = s.choice(True, False)
    layer = nn.TransformerEncoderLayer(s.width, 2, 5, 0.0, batch_first=first, norm_first=s.choice(True, False))
    return Part(lambda m, h: m.e(h) if first else m.e(h.transpose(0, 1)).transpose(0, 1), e=layer)


@piece()
def decoder_layer(s: Site) -> Part:
    own = {
        "d": nn.TransformerDecoderLayer(s.width, 2, 5, 0.0, batch_first=True),
        "q": s.parameter(1, s.places, s.width),
    }
    return Part(lambda m, h: m.d(m.q.expand(len(h), -1, -1), h), **own)


@piece()
def attention_by_hand(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        q, k, v = m.l(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        if m.folded:
            q, k, v = (z.flatten(0, 1) for z in (q, k, v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=m.causal)
        return m.o((z.unflatten(0, (len(h), 2)) if m.folded else z).transpose(1, 2).flatten(2))

    own = {"l": nn.Linear(s.width, 3 * s.width), "o": s.linear()}
    return Part(f, folded=s.choice(True, False), causal=s.choice(True, False), **own)


@piece()
def attention_over_one_place(s: Site) -> Part:
    def f(m: Part, h: Tensor) -> Tensor:
        return h + (m.q(h[:, :1]) @ m.k(h[:, :1]).mT).softmax(-1) @ m.v(h[:, :1])

    return Part(f, q=s.linear(), k=nn.Linear(s.width, s.width), v=nn.Linear(s.width, s.width))
