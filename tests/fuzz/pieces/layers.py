"""Layers as they are called by most models, and the functions of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fuzz.model import Part, Site
from fuzz.registry import piece


@piece()
def linear(s: Site) -> Part:
    return Part(lambda m, h: m.l(h), l=s.linear())


@piece()
def perceptron(s: Site) -> Part:
    act = s.choice(nn.ReLU(), nn.GELU(), nn.SiLU(), nn.ReLU(inplace=True), nn.Hardswish())
    return Part(lambda m, h: m.f(h), f=nn.Sequential(nn.Linear(s.width, 5), act, nn.Linear(5, s.width)))


@piece()
def repeated(s: Site) -> Part:
    return Part(lambda m, h: m.l(m.l(h).tanh()), l=s.linear())


@piece()
def layer_norm(s: Site) -> Part:
    return Part(lambda m, h: m.n(h), n=s.choice(nn.LayerNorm, nn.RMSNorm)(s.choice(s.width, (s.places, s.width))))


@piece()
def group_norm(s: Site) -> Part:
    return Part(lambda m, h: m.n(h.mT).mT, n=nn.GroupNorm(s.choice(1, 2), s.width))


@piece()
def instance_norm(s: Site) -> Part:
    return Part(lambda m, h: m.n(F.pad(h, (0, 0, 1, 1)).mT).mT[:, 1:-1], n=nn.InstanceNorm1d(s.width, affine=True))


@piece()
def batch_norm_in_eval(s: Site) -> Part:
    norm = nn.BatchNorm1d(s.width).eval()
    norm.train = lambda mode=True: norm  # type: ignore[method-assign]  # It stays in eval whatever the model does.
    return Part(lambda m, h: F.batch_norm(h.mT, m.n.running_mean, m.n.running_var, m.n.weight, m.n.bias).mT, n=norm)


@piece()
def functional_norm(s: Site) -> Part:
    own = {"w": s.parameter(s.width), "b": s.parameter(s.width)}
    layer = s.choice(True, False)
    return Part(
        lambda m, h: F.layer_norm(h, (h.shape[-1],), m.w, m.b) if layer else F.group_norm(h.mT, 2, m.w, m.b).mT, **own
    )


@piece()
def prelu(s: Site) -> Part:
    return Part(lambda m, h: m.p(h), p=nn.PReLU())


@piece()
def prelu_of_channels(s: Site) -> Part:
    return Part(lambda m, h: m.p(h.mT).mT, p=nn.PReLU(s.width))


@piece()
def bilinear(s: Site) -> Part:
    return Part(lambda m, h: m.b(h, h.roll(1, 1)), b=nn.Bilinear(s.width, s.width, s.width))


@piece()
def embedding(s: Site) -> Part:
    return Part(lambda m, h: h + m.e((h.detach()[..., 0] * 9).long().abs() % 7), e=nn.Embedding(7, s.width))


@piece()
def embedding_bag(s: Site) -> Part:
    bag = nn.EmbeddingBag(7, s.width, mode=s.choice("sum", "mean", "max"))
    return Part(lambda m, h: h + m.e((h.detach()[..., 0] * 9).long().abs() % 7)[:, None], e=bag)


@piece()
def in_place(s: Site) -> Part:
    do = s.choice(
        lambda z: F.relu_(z),
        lambda z: z.mul_(2),
        lambda z: z[:, 0].zero_(),
        lambda z: z[:, -1:].add_(1),
        lambda z: z.transpose(0, 1).tanh_(),
        lambda z: z.masked_fill_(z < 0, 0.0),
    )

    def f(m: Part, h: torch.Tensor) -> torch.Tensor:
        z = m.l(h)
        do(z)
        return z

    return Part(f, l=s.linear())


@piece()
def checkpointed(s: Site) -> Part:
    reentrant = s.choice(True, False)
    return Part(
        lambda m, h: checkpoint(m.f, h, use_reentrant=reentrant), f=nn.Sequential(s.linear(), nn.Tanh(), s.linear())
    )


@piece()
def detached(s: Site) -> Part:
    return Part(lambda m, h: h + m.l(h.detach()), l=s.linear())


@piece()
def without_gradient(s: Site) -> Part:
    return Part(lambda m, h: h * torch.no_grad()(m.l)(h).sigmoid() + m.l(h), l=s.linear())


@piece()
def dropout_in_eval(s: Site) -> Part:
    return Part(lambda m, h: F.dropout(m.l(h), 0.3, training=False), l=s.linear())


@piece()
def glu(s: Site) -> Part:
    return Part(lambda m, h: F.glu(m.l(h), -1), l=nn.Linear(s.width, 2 * s.width))


@piece()
def spectrum(s: Site) -> Part:
    own = {"w": s.parameter(s.places // 2 + 1, s.width, 2)}
    return Part(
        lambda m, h: torch.fft.irfft(torch.fft.rfft(h, dim=1) * torch.view_as_complex(m.w), h.shape[1], 1), **own
    )


@piece()
def complex_intermediate(s: Site) -> Part:
    return Part(lambda m, h: torch.fft.fft(m.l(h), dim=-1).abs() / 4, l=s.linear())
