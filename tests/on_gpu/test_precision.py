"""What products in TF32 and in half precision cost in digits, and that no check takes it for an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.workloads import WORKLOADS
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report

# TF32 has 11 bits, so that each product is off by up to 2^-11, and what comes out of twenty layers by a few times that.
OF_TF32 = 2e-2
# The tensors are those that the layer has, and sums of their products are taken in float32.
AS_CAPTURED = 1e-3


@pytest.fixture(params=[False, True], ids=["convolutions in TF32", "everything in TF32"])
def _tf32(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, request.param
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


Way = Callable[[nn.Module, Callable[..., Tensor], Tensor, Tensor], float]


def by_monitor(model: nn.Module, loss_fn: Callable[..., Tensor], x: Tensor, y: Tensor) -> float:
    with FisherMonitor(model) as monitor:
        for _ in range(6):  # checked and not
            loss_fn(model(x), y).backward()
    return float(monitor.trace)


def by_report(model: nn.Module, loss_fn: Callable[..., Tensor], x: Tensor, y: Tensor) -> float:
    return float(fisher_report(model, loss_fn, (x, y), progress=False)["fisher_trace"].sum())


def by_function(model: nn.Module, loss_fn: Callable[..., Tensor], x: Tensor, y: Tensor) -> float:
    return float(empirical_fisher_trace(model, loss_fn, x, y))


@pytest.mark.usefixtures("_tf32")
@pytest.mark.parametrize("way", [by_monitor, by_report, by_function])
@pytest.mark.parametrize("name", ["resnet", "mobilenet", "cnn", "encoder"])
def test_networks_in_tf32(name: str, way: Way) -> None:
    """ResNet's maps have as many rows as there are samples, so that numbers have to show which axis counts these."""
    setting = WORKLOADS[name].setting()
    with torch.device("cpu"):
        model = setting.model.to("cuda")
    x, y = setting.inputs.to("cuda"), setting.targets.to("cuda")
    squares = 0.0
    for n in range(len(x)):
        loss = setting.loss_fn(model(x[n : n + 1]), y[n : n + 1])
        squares += sum(float(g.double().square().sum()) for g in torch.autograd.grad(loss, list(model.parameters())))
    assert way(model, setting.loss_fn, x, y) == pytest.approx(squares / len(x), rel=OF_TF32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", [1, 7, 300])
def test_sums_are_those_of_the_tensors_as_captured(positions: int, dtype: torch.dtype) -> None:
    layer, x = nn.Linear(64, 48).to(dtype), torch.randn(6, positions, 64, dtype=dtype)
    kept: list[Tensor] = []
    with FisherMonitor(layer) as monitor:
        y = layer(x)
        y.register_hook(kept.append)
        (y.float() * torch.randn(6, positions, 48)).sum((1, 2)).mean().backward()
    g = kept[0].double() * len(x)
    weight = torch.einsum("nto,nti->noi", g, x.double()).square().sum() / len(x)
    bias = g.sum(1).square().sum() / len(x)
    assert list(monitor.report()["fisher_trace"]) == pytest.approx([float(weight), float(bias)], rel=AS_CAPTURED)
