"""Node rules: what functional uses and outputs with no monitor around go through, without a call for each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal, call, exact_fisher, per_sample_squared_norms, total, trace
from problems import BY_NAME
from torch_secorder import FisherMonitor, empirical_fisher_trace, generalized_fisher_trace
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.rules import node_rules
from torch_secorder.rules.node_rules import NodeUse, gradient_at, needs_node_call

ONE_BY_ONE = node_rules._one_by_one
FAMILIES = ("norm-", "prelu-", "bilinear-")


@pytest.fixture(autouse=True)
def no_calls_for_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: NodeUse, grads: Any) -> Tensor:
        if place.n == 1:  # one sample alone, with which results are verified
            return ONE_BY_ONE(place, grads)
        raise AssertionError(f"{place.node.name()} was called for one sample at a time")

    monkeypatch.setattr(node_rules, "_one_by_one", refuse)


NAMES = [name for name in BY_NAME if name.startswith(FAMILIES)]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_made_with_no_monitor_around(name: str) -> None:
    """One pass shows what a node's rule is asked, and is tried with each; every sixth takes one for each output element."""
    setting = BY_NAME[name].setting()
    model, x, y = setting.model, setting.inputs, setting.targets
    expected = total(trace(per_sample_squared_norms(model, squared_error, x, y)))
    found = generalized_fisher_trace(model, call(model, x), y, "mse", labels="observed")
    assert_equal(found, expected, expected)
    if name in NAMES[::6]:
        expected = total(trace(exact_fisher(model, x, loss_type="mse")))
        assert_equal(generalized_fisher_trace(model, call(model, x), None, "mse"), expected, expected)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum() / 2


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
    "a quotient": (lambda x, w: x / (w + 3), [(6,)]),
    "a quotient of a parameter": (lambda x, w: w / (x + 9), [(4, 1)]),
    "interpolated by a parameter": (lambda x, w: torch.lerp(x, x.tanh(), w), [(6,)]),
    "interpolated to a parameter": (lambda x, w, e: torch.lerp(w, torch.lerp(x, e, 0.3), 0.2), [(6,), (1, 4, 1)]),
    "a power": (lambda x, w: x.sigmoid() ** w, [(1, 6)]),
    "the larger and the smaller": (lambda x, v, w: torch.minimum(torch.maximum(x, v), w.exp()), [(6,), (6,)]),
    "clamped": (lambda x, v, w: torch.clamp(x, v - 1, w + 1), [(6,), (1, 6)]),
    "clamped on one side": (lambda x, v, w: torch.clamp(torch.clamp(x, min=v - 1), max=w + 1), [(6,), (6,)]),
    "where": (lambda x, w: torch.where(x > 0, x, w), [(4, 6)]),
    "an angle": (lambda x, w: torch.atan2(x, w), [(6,)]),
    "addcmul and addcdiv": (lambda x, v, w: torch.addcmul(v, x, torch.addcdiv(x, w, x + 9)), [(6,), (6,)]),
    "logaddexp": (lambda x, w: torch.logaddexp(x, w), [(6,)]),
    "rsub": (lambda x, w: torch.rsub(w, x), [(6,)]),
    "filled by a mask": (lambda x, w: x * w.masked_fill(x > 0, 2.0), [(6,)]),
    "interpolated in windows": (windows(lambda x, w: torch.lerp(x, x.tanh(), w)), [(2, 1)]),
    "a matrix on the left": (lambda x, w: (w @ x.reshape(len(x), -1).T).T, [(3, 24)]),
    "a matrix and its bias on the left": (
        lambda x, w, b: torch.addmm(b, w, x[:, 0].T, beta=2, alpha=3).T,
        [(3, 6), (3, 1)],
    ),
    "a stack on the left of an einsum": (lambda x, w: torch.einsum("hkc,bhc->bhk", w, x), [(4, 3, 6)]),
    "relative positions": (lambda x, w: torch.einsum("bhwc,hkc->bhwk", x.view(-1, 2, 2, 6), w), [(2, 3, 6)]),
    "a vector": (lambda x, w: x @ w, [(6,)]),
    "entries by number": (lambda x, w: w[(x * 3).long() % 5], [(5,)]),
    "rows by number": (lambda x, w: w[(x[..., 0] * 3).long() % 5 - 5], [(5, 3)]),
    "rows and columns": (lambda x, w: w[(x[..., 0] * 3).long() % 5, (x[..., 1] * 3).long() % 3], [(5, 3, 2)]),
    "columns by number": (lambda x, w: w[:, (x[..., 0] * 3).long() % 5].transpose(0, 1), [(2, 5, 3)]),
    "selected rows": (
        lambda x, w: w.index_select(1, (x[..., 0] * 3).long().flatten() % 5).T.reshape(len(x), -1),
        [(2, 5)],
    ),
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
    expected = trace(per_sample_squared_norms(model, loss_fn, x, y), "sum")
    assert_equal(empirical_fisher_trace(model, loss_fn, x, y), total(expected), total(expected))
    with FisherMonitor(model, reduction="sum") as monitor:
        loss_fn(model(x), y).backward()
    for name, value in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), value, total(expected))
    # The same in outputs that were made before, with passes through their graph.
    fisher = total(trace(exact_fisher(model, x, loss_type="mse")))
    assert_equal(generalized_fisher_trace(model, model(x), None, "mse"), fisher, fisher)


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
    assert needs_node_call(place) == training
    if not training:
        form, rule, at_once = gradient_at(place, (g, None, None, None), 0)
        normalized = (x - mean[:, None]) / (variance[:, None] + 1e-3).sqrt()
        assert rule == "cudnnbatchnorm"
        assert at_once
        torch.testing.assert_close(form.dense(), (g * normalized).sum(2))


@pytest.fixture
def fused_rms_norm() -> Iterator[None]:
    """torch's fused norm on the CPU, which lacks a kernel of its own: ``F.rms_norm`` makes the node that it makes on GPUs."""

    def forward(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        axes = tuple(range(-len(shape), 0))
        scale = (wide.square().mean(axes, keepdim=True) + (torch.finfo(wide.dtype).eps if eps is None else eps)).rsqrt()
        return (wide * scale * (1 if weight is None else weight)).to(x.dtype), scale

    def backward(
        g: Tensor, x: Tensor, shape: list[int], scale: Tensor, weight: Tensor | None, mask: list[bool]
    ) -> tuple[Tensor, Tensor]:
        axes, wide = tuple(range(-len(shape), 0)), x.to(scale.dtype)
        along = g * (1 if weight is None else weight)
        found = scale * (along - wide * scale.square() * (along * wide).mean(axes, keepdim=True))
        return found.to(x.dtype), (g * wide * scale).sum_to_size(shape).to(x.dtype)

    with torch.library._scoped_library("aten", "IMPL") as kernels:
        kernels.impl("_fused_rms_norm", forward, "CPU")
        kernels.impl("_fused_rms_norm_backward", backward, "CPU")
        yield


needs_fused_rms_norm = pytest.mark.skipif(
    not hasattr(torch.ops.aten, "_fused_rms_norm_backward"), reason="this torch has no fused root mean square norm"
)
FUSED = {
    "of the last axis": (lambda x, w: F.rms_norm(x, (6,), w), (6,)),
    "of the last axes": (lambda x, w: F.rms_norm(x, (4, 6), w, 0.1), (4, 6)),
    "in windows": (windows(lambda x, w: F.rms_norm(x, (3,), w, 1e-3)), (3,)),
}


@needs_fused_rms_norm
@pytest.mark.usefixtures("fused_rms_norm")
@pytest.mark.parametrize("name", FUSED)
def test_the_fused_rms_norm_of_gpus(name: str) -> None:
    function, shape = FUSED[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), Functional(function, shape)).double(), torch.randn(5, 4, 6).double()
    y, loss_fn = torch.randn_like(model(x)), nn.MSELoss(reduction="sum")
    expected = trace(per_sample_squared_norms(model, loss_fn, x, y), "sum")
    with FisherMonitor(model, reduction="sum", diagonal=True) as monitor:
        loss_fn(model(x), y).backward()
    report = monitor.report()
    assert report.loc["1.values.0", "rule"] == "fusedrmsnorm (dense)"
    for parameter, value in expected.items():
        assert_equal(torch.tensor(report.loc[parameter, "fisher_trace"]), value, total(expected))
    fisher = total(trace(exact_fisher(model, x, loss_type="mse")))
    assert_equal(generalized_fisher_trace(model, model(x), None, "mse"), fisher, fisher)


def fused_node(x: Tensor, eps: float) -> SimpleNamespace:
    """What the node of such a norm over the last axis shows; it keeps its scale in float32 at least."""
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return SimpleNamespace(
        name=lambda: "FusedRmsNormBackward0",
        _input_metadata=[SimpleNamespace(dtype=x.dtype, is_nested_tensor=False)],
        _saved_input=x,
        _saved_normalized_shape=(x.shape[-1],),
        _saved_result1=(wide.square().mean(-1, keepdim=True) + eps).rsqrt(),
    )


@needs_fused_rms_norm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_fused_rms_norm_of_half_precision_is_summed_in_more(dtype: torch.dtype) -> None:
    """1,000 positions, whose sum in the layer's own dtype would have two digits."""
    torch.manual_seed(0)
    x, g = (torch.randn(3, 1000, 6).to(dtype) for _ in range(2))
    form = gradient_at(NodeUse(fused_node(x, 1e-3), 1, (6,), (3, 1000, 6), Placement(), 3), (g, None), 0).form
    expected = (g.double() * F.rms_norm(x.double(), (6,), None, 1e-3)).sum(1)
    torch.testing.assert_close(form.dense().double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@needs_fused_rms_norm
def test_the_rule_of_the_fused_rms_norm_can_be_differentiated() -> None:
    """Its scale is a constant in the graph, and is not one of the input."""
    g = torch.randn(3, 5, 4, dtype=torch.float64)

    def gradient(x: Tensor) -> Tensor:
        return gradient_at(NodeUse(fused_node(x, 1e-2), 1, (4,), (3, 5, 4), Placement(), 3), (g, None), 0).form.dense()

    assert torch.autograd.gradcheck(gradient, (torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True),))


def experts(x: Tensor, w: Tensor) -> Tensor:
    """Four matrices, of which each gets the positions that a router sends to it; the second gets none."""
    rows = F.pad(x.reshape(-1, x.shape[-1]).float(), (0, 2))  # sizes have to be multiples of 16 bytes
    chosen = torch.tensor([0, 2, 3])[(rows[:, 0] * 3).long() % 3]
    order = chosen.argsort(stable=True)
    ends = torch.bincount(chosen, minlength=4).cumsum(0).int()
    found = F.grouped_mm(rows[order], w.float(), offs=ends)
    return found.tanh()[order.argsort()].reshape(*x.shape[:-1], -1).to(x.dtype)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has grouped products on GPUs only")
def test_experts_of_a_grouped_product() -> None:
    """torch has the product in float32 at most, so that both sides are compared in that."""
    torch.manual_seed(0)
    model, x = Functional(experts, (4, 8, 4)).float(), torch.randn(5, 4, 6)
    y = torch.randn_like(model(x))
    loss_fn = nn.MSELoss(reduction="sum")
    expected = trace(per_sample_squared_norms(model, loss_fn, x, y), "sum")["values.0"]
    with FisherMonitor(model, reduction="sum", diagonal=True, per_sample=True) as monitor:
        loss_fn(model(x), y).backward()
    assert monitor.report().loc["values.0", "rule"] == "groupedmm (routed)"
    assert_equal(monitor.trace, expected, expected, torch.float32)
    assert_equal(monitor.diagonal["values.0"].sum(), expected, expected, torch.float32)


def test_a_node_that_sums_over_the_samples_itself_is_called_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another version of torch may have it: the gradient arrives in the shape of the value."""
    vjp = node_rules.node_vjp

    def summed(node: Any, grads: Any) -> list[Tensor | None]:
        return [x if x is None else x.sum_to_size(6) for x in vjp(node, grads)]

    monkeypatch.setattr(node_rules, "node_vjp", summed)
    monkeypatch.setattr(node_rules, "_one_by_one", ONE_BY_ONE)
    model = Functional(*USES["a quotient"][:1], *USES["a quotient"][1])
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    loss_fn = nn.MSELoss(reduction="sum")
    y = torch.randn_like(model(x))
    expected = total(trace(per_sample_squared_norms(model, loss_fn, x, y), "sum"))
    with FisherMonitor(model, reduction="sum") as monitor:
        loss_fn(model(x), y).backward()
    assert_equal(monitor.trace, expected, expected)
    assert monitor.report()["rule"].tolist() == ["div, one sample at a time (dense)"]
