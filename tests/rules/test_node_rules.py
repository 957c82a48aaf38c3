"""Node rules: what functional uses and outputs with no monitor around go through, without a call for each sample."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal, call, exact_fisher, per_sample_squared_norms, total, trace
from problems import BY_NAME
from torch_secorder import empirical_fisher_trace, generalized_fisher_trace
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.rules import node_rules
from torch_secorder.rules.node_rules import NodeUse, gradient_at, has_rule

FAMILIES = ("norm-", "prelu-", "bilinear-")


@pytest.fixture(autouse=True)
def no_calls_for_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    one_by_one = node_rules._one_by_one

    def refuse(place: NodeUse, grads: Any) -> Tensor:
        if place.n == 1:  # one sample alone, with which results are verified
            return one_by_one(place, grads)
        raise AssertionError(f"{place.node.name()} was called for one sample at a time")

    monkeypatch.setattr(node_rules, "_one_by_one", refuse)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BY_NAME if name.startswith(FAMILIES)])
def test_outputs_made_with_no_monitor_around(name: str) -> None:
    setting = BY_NAME[name].setting()
    expected = total(trace(exact_fisher(setting.model, setting.inputs, loss_type="mse")))
    outputs = call(setting.model, setting.inputs)
    assert_equal(generalized_fisher_trace(setting.model, outputs, None, "mse"), expected, expected)


class Functional(nn.Module):
    """Parameters that are used by a function, and not by the forward of a module."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]):
        super().__init__()
        self.function = function
        self.values = nn.ParameterList(torch.randn(shape, dtype=torch.float64) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.values).flatten(1)


def windows(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Four windows of each sample, folded into the batch."""
    return lambda x, *values: function(x.reshape(-1, 2, x.shape[-1] // 2), *values).reshape(len(x), -1)


def running(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, variance = torch.linspace(-2, 3, 2).double(), torch.tensor([0.5, 2.0]).double()
    return F.batch_norm(x, mean, variance, weight, bias)


USES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(4,), (4,)]),
    "group_norm in windows": (windows(lambda x, w, b: F.group_norm(x, 1, w, b)), [(2,), (2,)]),
    "batch_norm in windows": (windows(running), [(2,), (2,)]),
    "prelu in windows": (windows(F.prelu), [(2,)]),
    "bilinear": (lambda x, w: F.bilinear(x[..., :3], x[..., 3:], w), [(2, 3, 3)]),
    "a token for each sample": (lambda x, t: torch.cat([t.repeat(len(x), 1, 1), x], 1).tanh(), [(1, 1, 6)]),
    "repeated along samples and positions": (lambda x, t: x * t.repeat(len(x), 4, 1), [(1, 1, 6)]),
    "repeated in one row": (lambda x, t: x * t.repeat(len(x)).view(len(x), 1, 6), [(6,)]),
    "repeated twice for each sample": (lambda x, t: x * t.repeat(2 * len(x), 1, 1).view(x.shape), [(1, 2, 6)]),
}


@pytest.mark.parametrize("name", USES)
def test_functional_uses(name: str) -> None:
    function, shapes = USES[name]
    torch.manual_seed(0)
    model = Functional(function, *shapes)
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    y = torch.randn_like(model(x))
    loss_fn = nn.MSELoss(reduction="sum")
    expected = total(trace(per_sample_squared_norms(model, loss_fn, x, y), "sum"))
    assert_equal(empirical_fisher_trace(model, loss_fn, x, y), expected, expected)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(8, 2)),
        nn.Sequential(nn.Conv1d(2, 4, 2), nn.InstanceNorm1d(4, affine=True), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)),
        nn.Sequential(nn.Conv1d(2, 4, 2), nn.BatchNorm1d(4), nn.PReLU(4), nn.Flatten(), nn.Linear(8, 2)).eval(),
    ],
    ids=["group", "instance", "batch"],
)
def test_their_traces_can_be_differentiated(model: nn.Module) -> None:
    model = model.double()
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)

    def traced(x: Tensor) -> Tensor:
        return generalized_fisher_trace(model, model(x), None, create_graph=True)

    assert torch.autograd.gradcheck(traced, (x,))


@pytest.mark.parametrize("training", [False, True])
def test_the_batch_norm_of_gpus(training: bool) -> None:
    """As the node of cuDNN has it: running statistics and ``epsilon`` under names of its own."""
    x, g = (torch.randn(3, 4, 5, dtype=torch.float64) for _ in range(2))
    mean, variance = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    node = SimpleNamespace(
        name=lambda: "CudnnBatchNormBackward0",
        _input_metadata=[SimpleNamespace(dtype=x.dtype, is_nested_tensor=False)],
        _saved_input=x,
        _saved_running_mean=mean,
        _saved_running_var=variance,
        _saved_epsilon=1e-3,
        _saved_training=training,
    )
    place = NodeUse(node, 1, (4,), (3, 4, 5), Placement(), 3)
    assert has_rule(place) == (not training)
    if not training:
        form, rule = gradient_at(place, (g, None, None, None), 0)
        normalized = (x - mean[:, None]) / (variance[:, None] + 1e-3).sqrt()
        assert rule == "cudnnbatchnorm"
        torch.testing.assert_close(form.dense(), (g * normalized).sum(2))
