"""Linear layers and convolutions of shapes that hypothesis thinks of, in both directions of every choice by cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from oracles import assert_equal, per_sample_gradients, squared_norms
from torch_secorder import FisherMonitor

pytestmark = pytest.mark.slow

few = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])
small = st.integers(1, 5)


def check(model: nn.Module, x: Tensor, reduction: str, dtype: torch.dtype) -> None:
    """Traces, diagonals and per-sample squared norms of one layer under a random linear loss."""
    model, x = model.to(dtype), x.to(dtype)
    with torch.no_grad():
        direction = torch.randn(model(x).shape, dtype=torch.float64).to(dtype)
    scale = 1 / len(x) if reduction == "mean" else 1.0

    def loss(outputs: Tensor, weights: Tensor) -> Tensor:
        return (outputs * weights).sum() * (1 / len(outputs) if reduction == "mean" else 1.0)

    gradients = per_sample_gradients(model, loss, x, direction)
    with FisherMonitor(model, reduction=reduction) as plain:
        loss(model(x), direction).backward()
    with FisherMonitor(model, reduction=reduction, diagonal=True, per_sample=True) as full:
        loss(model(x), direction).backward()
    total = sum(t.sum() for t in squared_norms(gradients).values())
    for name, t in squared_norms(gradients).items():
        for monitor in (plain, full):
            assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), scale * t.sum(), total, dtype)
        assert_equal(torch.tensor(full.per_sample[name].to_numpy()), t, total, dtype)
        if dtype == torch.float64:
            assert_equal(full.diagonal[name], scale * gradients[name].square().sum(0), total, dtype)


common: dict[str, Any] = {
    "bias": st.booleans(),
    "reduction": st.sampled_from(["mean", "sum"]),
    "dtype": st.sampled_from([torch.float64, torch.float32]),
    "seed": st.integers(0, 2**16),
}


@few
@given(n=small, middle=st.lists(small, max_size=3), i=st.integers(1, 12), o=st.integers(1, 12), **common)
def test_linear(
    n: int, middle: list[int], i: int, o: int, bias: bool, reduction: str, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    check(nn.Linear(i, o, bias=bias), torch.randn(n, *middle, i), reduction, dtype)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution of one, two or three axes with whatever settings fit, and the shape of one sample."""
    d, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    per_axis = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(d))  # noqa: E731
    kernel, stride, dilation, padding = per_axis(1, 3), per_axis(1, 3), per_axis(1, 2), per_axis(0, 2)
    size, groups = per_axis(1, 6 if d < 3 else 4), draw(st.integers(1, 3))
    arguments: dict[str, Any] = {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": kernel,
        "groups": groups,
        "stride": stride,
        "dilation": dilation,
        "padding": padding,
        "bias": draw(st.booleans()),
    }
    reach = [dil * (k - 1) + 1 for dil, k in zip(dilation, kernel, strict=True)]
    if transposed:
        room = [max(s, dil) - 1 for s, dil in zip(stride, dilation, strict=True)]
        arguments["output_padding"] = tuple(draw(st.integers(0, most)) for most in room)
        out = [
            (n - 1) * s - 2 * p + r + extra
            for n, s, p, r, extra in zip(size, stride, padding, reach, arguments["output_padding"], strict=True)
        ]
        assume(min(out) > 0)
        layer: type[nn.Module] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[d - 1]
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        arguments["padding_mode"] = mode
        if draw(st.booleans()):
            arguments |= {"padding": draw(st.sampled_from(["same", "valid"])), "stride": 1}
        pads = [0] * d if arguments["padding"] == "valid" else padding
        if arguments["padding"] == "same":
            pads = [(r - 1 + 1) // 2 for r in reach]
        limit = {"reflect": 1, "circular": 0}.get(mode)
        assume(limit is None or all(p <= n - limit for p, n in zip(pads, size, strict=True)))
        covered = [
            n + (r - 1 if arguments["padding"] == "same" else 2 * p) for n, p, r in zip(size, pads, reach, strict=True)
        ]
        assume(all(c >= r for c, r in zip(covered, reach, strict=True)))
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
    return layer(**arguments), (arguments["in_channels"], *size)


@settings(few, max_examples=120)
@given(case=convolutions(), n=st.integers(1, 3), **{k: v for k, v in common.items() if k != "bias"})
def test_convolutions(
    case: tuple[nn.Module, tuple[int, ...]], n: int, reduction: str, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    layer, shape = case
    check(layer, torch.randn(n, *shape), reduction, dtype)


@few
@given(
    n=small,
    length=st.integers(1, 12),
    words=st.integers(1, 6),
    width=st.integers(1, 5),
    padding=st.booleans(),
    **{k: v for k, v in common.items() if k != "bias"},
)
def test_embeddings(
    n: int, length: int, words: int, width: int, padding: bool, reduction: str, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Embedding(words, width, padding_idx=words // 2 if padding else None).to(dtype)
    ids = torch.randint(words, (n, length))
    direction = torch.randn(n, length, width, dtype=dtype)

    def loss(outputs: Tensor, weights: Tensor) -> Tensor:
        return (outputs * weights).sum() * (1 / len(outputs) if reduction == "mean" else 1.0)

    t = squared_norms(per_sample_gradients(layer, loss, ids, direction))["weight"]
    with FisherMonitor(layer, reduction=reduction) as monitor:
        loss(layer(ids), direction).backward()
    expected = t.mean() if reduction == "mean" else t.sum()
    assert_equal(monitor.trace, expected, expected, dtype)
