"""Convolutions of all dimensions, strides, groups and paddings."""

from __future__ import annotations

from torch import Tensor, nn

from fuzz.model import Part, Site
from fuzz.registry import piece


@piece()
def conv1d(s: Site) -> Part:
    dilation = s.choice(1, 2)
    layer = nn.Conv1d(
        *(s.width, s.width, 3, 1, dilation, dilation, s.choice(1, 2, s.width), s.choice(True, False)),
        padding_mode=s.choice("zeros", "zeros", "replicate"),
    )
    return Part(lambda m, h: m.c(h.mT).mT, c=layer)


@piece()
def repeated_conv1d(s: Site) -> Part:
    return Part(lambda m, h: m.c(m.c(h.mT).tanh()).mT, c=nn.Conv1d(s.width, s.width, 3, padding="same"))


@piece()
def conv2d(s: Site) -> Part:
    layer = nn.Conv2d(1, 2, s.choice(1, 3), s.choice(1, 2), 1)
    return Part(lambda m, h: h * m.c(h[:, None]).tanh().mean((1, 2, 3))[:, None, None], c=layer)


@piece()
def conv2d_of_frames(s: Site) -> Part:
    outside = s.choice(True, False)

    def f(m: Part, h: Tensor) -> Tensor:
        x = (h if outside else h.transpose(0, 1)).flatten(0, 1)
        y = m.c(x.view(len(x), 2, -1, 1).expand(-1, -1, -1, 3)).flatten(1).mean(1).tanh()
        return h * (y.view(h.shape[:2]) if outside else y.view(h.shape[1], -1).T)[..., None]

    return Part(f, c=nn.Conv2d(2, 4, (3, s.choice(1, 2)), s.choice(1, 2), (1, 1), groups=s.choice(1, 2)))


@piece()
def conv3d(s: Site) -> Part:
    layer = nn.Conv3d(1, 1, (3, 1, 3), padding=(1, 0, 1))
    return Part(lambda m, h: m.c(h[:, None, :, None]).flatten(1).view(h.shape), c=layer)


@piece()
def transposed_conv(s: Site) -> Part:
    layer = nn.ConvTranspose1d(s.width, s.width, 4, 2, 1, s.choice(0, 1), s.choice(1, 2))
    return Part(lambda m, h: m.c(h.mT).mT[:, : h.shape[1]], c=layer)


@piece()
def squeeze_and_excite(s: Site) -> Part:
    own = {"a": nn.Conv1d(s.width, 2, 1), "b": nn.Conv1d(2, s.width, 1)}
    return Part(lambda m, h: h * m.b(m.a(h.mT.mean(2, keepdim=True)).relu()).sigmoid().mT, **own)
