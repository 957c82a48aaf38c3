"""The traps that tools of this kind fall into, one after the other: each is exact, or refused in words that say what to do.

Layers and uses have problem lists of their own; here each trap is met in a whole model.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expectations import expectation
from model_state import assert_same_gradients, gradients, hooks
from oracles import Inputs, assert_equal, call, exact_fisher, per_sample_squared_norms, total, trace
from problems._base import Forward, randomised
from torch_secorder import FisherMonitor, fisher_report
from torch_secorder.batch_axis.evidence import Sketch, Unplaced, evidence, sample_marks
from torch_secorder.errors import CoupledSamplesError, CoverageError, CurvatureError, ShapeError, SlowFallbackWarning
from torch_secorder.per_sample import SharedFactor

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # re-entrant checkpoints

Loss = Callable[[Any, Tensor], Tensor]


def numbers(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).sum(1).mean()


def drawn(model: nn.Module, *shape: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The model with random weights, its input and its targets, in float64."""
    model, x = randomised(model).double(), torch.randn(*shape).double()
    with torch.no_grad():
        return model, x, torch.randn_like(model(x))


def assert_exact(
    model: nn.Module, inputs: Inputs, targets: Tensor, loss_fn: Loss = numbers, report: bool = True, **options: Any
) -> FisherMonitor:
    """The monitor's traces and samples, and fisher_report's traces, are those of the loop."""
    expected = per_sample_squared_norms(model, loss_fn, inputs, targets)
    everything = total(trace(expected))
    with FisherMonitor(model, per_sample=True, **options) as monitor:
        loss_fn(call(model, inputs), targets).backward()
    for name, t in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), t.mean(), everything, torch.float64)
        assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()), t, everything * len(t), torch.float64)
    if report:
        assert_report_exact(model, inputs, targets, loss_fn, expected, **options)
    assert not any(hooks(model).values())
    return monitor


def assert_report_exact(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    loss_fn: Loss = numbers,
    expected: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """fisher_report's traces are those of the loop, or of squared norms that were found already."""
    expected = expected or per_sample_squared_norms(model, loss_fn, inputs, targets)
    table = fisher_report(model, loss_fn, (inputs, targets), progress=False, **options)
    for name, t in expected.items():
        assert_equal(torch.tensor(table.loc[name, "fisher_trace"]), t.mean(), total(trace(expected)), torch.float64)


def of_one_graph(model: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    """t_{n,p} from the samples' losses of one forward: the reference where another forward would draw other numbers."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True) for loss in losses]
    return {
        name: torch.stack([torch.zeros(()) if g is None else g.double().square().sum() for g in column])
        for name, column in zip(named, zip(*rows, strict=True), strict=True)
    }


# 1. Tied weights


class ThreeWays(nn.Module):
    """One table: an embedding, a head in the model's forward, and a transposed use with a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 7), nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x.long().abs() % 7)
        h = F.linear(self.inner(h).tanh(), 2 * self.words.weight.t())
        return self.head(h)


def test_trap_01_tied_weights() -> None:
    assert_exact(*drawn(ThreeWays(), 4, 6))


@pytest.mark.parametrize("tie", ["modules", "functions"])
@pytest.mark.parametrize("n", [3, 4, 5])
def test_trap_01_tied_weights_whose_uses_see_the_samples_in_another_order(tie: str, n: int) -> None:
    """As packed sequences do, or anything that sorts its batch: the cross terms are between rows of one sample."""

    def forward(m: Any, x: Tensor) -> Tensor:
        use = m.layer if tie == "modules" else (lambda x: F.linear(x, m.layer.weight, m.layer.bias))
        order = x[:, 0].argsort()
        return use(x).tanh() + use(2 * x[order]).tanh()[order.argsort()]

    model, x, y = drawn(Forward(forward, layer=nn.Linear(4, 3)), n, 4)
    assert_exact(model, x, y, report=False)
    assert_exact(model, x.flip(0), y, report=False)


def test_trap_01_another_order_in_every_batch() -> None:
    """What was found out for one batch need not hold for the next."""

    def forward(m: Any, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        h = F.linear(x[order], m.layer.weight).tanh()
        return F.linear(h[order.argsort()] + x, m.layer.weight)

    model, x, y = drawn(Forward(forward, layer=nn.Linear(4, 4, bias=False)), 6, 4)
    x = x[x[:, 0].argsort()]
    batches = [(x, y), (x.flip(0), y), (x[[2, 0, 1, 5, 4, 3]], y)]
    expected = torch.cat([per_sample_squared_norms(model, numbers, x, y)["layer.weight"] for x, y in batches])
    with FisherMonitor(model, per_sample=True) as monitor:
        for x, y in batches:
            numbers(model(x), y).backward()
    assert_equal(torch.tensor(monitor.per_sample["layer.weight"].to_numpy()), expected, expected.sum())


# 2. A module called several times


def test_trap_02_a_module_called_several_times_and_under_no_grad() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = m.layer(x).sigmoid()
        return m.layer(gate * m.layer(x).tanh())

    assert_exact(*drawn(Forward(forward, layer=nn.Linear(5, 5)), 4, 3, 5))


# 3. Parameters used outside of their module, or computed from others


class Gated(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        z = 2 * weight
        return z + z.square()


def test_trap_03_a_chain_with_several_ways() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Gated())
    assert_exact(*drawn(model, 5, 4))


def test_trap_03_a_parameter_used_in_its_module_and_outside_of_it() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(m.layer(x).tanh(), m.layer.weight.t()) * m.layer.bias.sum() + m.layer.weight.sum()

    assert_exact(*drawn(Forward(forward, layer=nn.Linear(4, 3)), 5, 4))


class Rounded(torch.autograd.Function):
    """A straight-through estimator, as quantisation-aware training uses it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return (weight * 8).round() / 8

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


@pytest.mark.parametrize("where", ["chain", "frontier"])
def test_trap_03_a_users_own_autograd_function(where: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.layer(x).tanh()
        return F.linear(h, Rounded.apply(m.weight)) if where == "chain" else Product.apply(h, m.weight)

    model = Forward(forward, layer=nn.Linear(4, 4))
    model.weight = nn.Parameter(torch.zeros(3, 4))
    assert_exact(*drawn(model, 5, 2, 4))


def test_trap_03_a_penalty_on_weights_is_refused() -> None:
    model, x, y = drawn(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), 5, 4)

    def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
        return numbers(outputs, targets) + 0.1 * model[0].weight.square().sum()

    with pytest.raises(CoverageError, match=r"0\.weight"), FisherMonitor(model):
        penalised(model(x), y).backward()
    with pytest.raises(CoverageError, match=r"0\.weight"):
        fisher_report(model, penalised, (x, y), progress=False)


# 4. Parameters without a batch axis, and 5. batches elsewhere: T == B everywhere


class Square(nn.Module):
    """Every size is the same, so that no shape tells anything."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(n, n), nn.Embedding(n, n)
        self.offset, self.first = nn.Parameter(torch.zeros(n, n)), nn.Parameter(torch.zeros(1, 1, n))
        self.mix, self.norm, self.across = nn.Linear(n, n), nn.LayerNorm(n), nn.Linear(n, n)
        self.attention = nn.MultiheadAttention(n, 1, batch_first=False)
        self.recurrent = nn.GRU(n, n)
        self.bias = nn.Embedding(n, 1)
        self.conv = nn.Conv1d(n, n, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        steps = torch.arange(n)
        h = self.words((x * 3).long().abs() % n) + self.positions(steps) + self.offset + self.first
        h = self.mix(h).tanh() + self.across(h.transpose(1, 2)).transpose(1, 2).tanh()
        h = self.norm(h).transpose(0, 1)
        mask = self.bias((steps[:, None] - steps).abs()).squeeze(-1)
        h = h + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        h = h + self.recurrent(h)[0]
        h = self.conv(h.transpose(0, 1))
        return h.flatten(0, 1).tanh().unflatten(0, x.shape)


@pytest.mark.parametrize(("n", "t"), [(4, 4), (5, 5), (8, 8), (1, 4), (3, 5)])
def test_traps_04_and_05_as_many_samples_as_positions_and_features(n: int, t: int) -> None:
    assert_exact(*drawn(Square(t), n, t))


def test_trap_04_a_class_token_after_dropout_and_a_second_use() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        token = F.dropout(m.token.weight, 0.0).expand(len(x), -1, -1)
        return m.layer(torch.cat([token, x], 1)) * m.token.weight.sum(0)[:3]

    assert_exact(*drawn(Forward(forward, token=nn.Embedding(2, 4), layer=nn.Linear(4, 3)), 5, 3, 4))


@pytest.mark.parametrize("move", ["clone", "t", "contiguous", "mul"])
def test_trap_04_a_module_without_a_batch_axis_whose_output_is_moved(move: str) -> None:
    moves: dict[str, Callable[[Tensor], Tensor]] = {
        "clone": lambda b: b.clone().t(),
        "t": lambda b: b.t(),
        "contiguous": lambda b: b.t().contiguous(),
        "mul": lambda b: b.t() * 2,
    }
    model = Forward(
        lambda m, x: m.layer(x).transpose(1, 2) + moves[move](m.places(torch.arange(x.shape[1]))),
        layer=nn.Linear(4, 4),
        places=nn.Embedding(3, 4),
    )
    assert_exact(*drawn(model, 5, 3, 4))


def test_trap_05_windows_and_heads_folded_into_the_batch() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        n, t, d = x.shape
        windows = m.one(x.unflatten(1, (2, t // 2)).transpose(1, 2).reshape(n * t // 2, 2, d))
        heads = windows.reshape(n, t, 2, d // 2).transpose(1, 2).reshape(n * 2, t, d // 2)
        return m.two(m.norm(heads)).reshape(n, 2, t, -1).mean(1)

    model = Forward(forward, one=nn.Linear(4, 4), norm=nn.LayerNorm(2), two=nn.Linear(2, 3))
    assert_exact(*drawn(model, 3, 6, 4))
    assert_exact(*drawn(model, 6, 6, 4))


class Placed(nn.Module):
    """A table of positions, read by ids that each sample has of its own or that all share."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.features = nn.Parameter(torch.randn(9, 6)), nn.Parameter(torch.randn(6, 2))
        self.tokens, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        angles = torch.stack([positions.double().sin(), positions.double().cos()], -1)
        places = F.embedding(positions, self.table) + F.linear(angles, self.features)
        return self.head(torch.tanh(self.tokens(ids) + places).mean(1))


@pytest.mark.parametrize("n", [2, 4, 5])
@pytest.mark.parametrize("order", ["own, one, shared", "one, own, shared", "own, shared, one"])
def test_trap_4_ids_that_are_shared_in_some_batches(order: str, n: int) -> None:
    """What was found out in one batch must not be believed of another kind, whatever coincides."""
    positions = {"own": (n, 4), "one": (1, 4), "shared": (4,)}
    torch.manual_seed(17)
    model, ids, y = Placed().double(), torch.randint(9, (n, 4)), torch.randn(n, 3).double()
    for kind in order.split(", ") * 2:
        read = torch.randint(9, positions[kind])
        with FisherMonitor(model, per_sample=True) as monitor:
            numbers(model(ids, read), y).backward()
        for name, parameter in model.named_parameters():
            own = [read[i : i + 1] if kind == "own" else read for i in range(n)]
            losses = [numbers(model(ids[i : i + 1], own[i]), y[i : i + 1]) for i in range(n)]
            t = torch.stack([torch.autograd.grad(loss, parameter)[0].square().sum() for loss in losses])
            torch.testing.assert_close(torch.tensor(monitor.per_sample[name].to_numpy()), t)


def test_trap_4_what_samples_share_does_not_look_like_one_samples_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    (weights,) = sample_marks(5)[1:]
    for _ in range(300):
        parts = torch.randn(5, 1, 4, 6, generator=generator)
        scaled = Sketch.of((weights.to(parts).view(5, 1, 1, 1) * parts).sum(0))
        assert evidence(Sketch.of(parts.sum(0)), [scaled], 5) is Unplaced.SHARED_BY_SAMPLES


# 6. In-place operations, outputs of every kind, keywords


def test_trap_06_in_place_after_views_and_outputs_of_every_kind() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, *, values: Tensor) -> dict[str, Any]:
            h = self.one(input=values).mul_(2)
            h[..., 0].add_(1)
            return {"pair": (self.two(h), h), "text": "two"}

    def forward(m: Any, x: Tensor) -> Tensor:
        one, two = m.both(values=x)["pair"]
        one += two
        return m.last(one.clamp_(-3, 3))

    assert_exact(*drawn(Forward(forward, both=Both(), last=nn.Linear(4, 2)), 5, 3, 4))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].mul_(-3)  # which a sum gave to others too


class Adversarial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        adverse = Reversed.apply(self.second(x).tanh())
        return adverse + self.first(x)


def test_trap_6_a_gradient_that_is_changed_in_place_while_it_waits() -> None:
    """The first three passes take each gradient at once, and are right; later ones put small calls together, and refuse."""
    model, x, y = drawn(Adversarial(), 4, 6)
    expected = []
    for n in range(4):
        model.zero_grad()
        numbers(model(x[n : n + 1]), y[n : n + 1]).backward()
        expected.append([float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None])
    with FisherMonitor(model, per_sample=True) as monitor:
        for refusal in [""] * 3 + [r"'first': the gradient of its output was changed in place"] * 3:
            loss = numbers(model(x), y)
            with expectation(refusal):
                loss.backward()
    assert monitor.n_samples == 4 * 3
    found = torch.tensor(monitor.per_sample.to_numpy())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).repeat(3, 1))


# 7. Coupled samples


@pytest.mark.parametrize("affine", [True, False])
def test_trap_07_batch_statistics_are_refused(affine: bool) -> None:
    model, x, y = drawn(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=affine), nn.Linear(4, 2)).eval(), 5, 4)
    assert_exact(model, x, y)
    model.train()
    with pytest.raises(CoupledSamplesError, match=r"BatchNorm1d '1'.*eval"), FisherMonitor(model):
        model(x)
    with pytest.raises(CoupledSamplesError, match=r"BatchNorm1d '1'.*eval"):
        fisher_report(model, numbers, (x, y), progress=False)


def test_trap_07_a_loss_that_compares_samples_is_refused() -> None:
    model, x, y = drawn(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), 5, 4)

    def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))

    with pytest.raises(CurvatureError, match=r"(?i)samples"):
        fisher_report(model, contrastive, (x, y), progress=False)


# 8. Frozen parts, and losses that reach only some outputs


def test_trap_08_partly_frozen_and_partly_reached() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.one(x).tanh()
        m.unreached(h)
        return m.two(h)[:, :1]

    model = Forward(forward, one=nn.Linear(4, 4), two=nn.Linear(4, 3), unreached=nn.Linear(4, 2))
    model, x, y = drawn(model, 5, 4)
    model.one.weight.requires_grad_(False)
    monitor = assert_exact(model, x, y)
    assert list(monitor.report().index) == ["one.bias", "two.weight", "two.bias", "unreached.weight", "unreached.bias"]
    assert list(monitor.report()["rule"] == "unused") == [False, False, False, True, True]


# 9. Activation checkpointing


class Blocks(nn.Module):
    """Blocks of layers, each checkpointed."""

    def __init__(self, depth: int, use_reentrant: bool | None, width: int = 4):
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + (block(h) if self.use_reentrant is None else checkpoint(block, h, use_reentrant=self.use_reentrant))
        return self.last(h)


kinds = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-re-entrant", "re-entrant"])


REENTRANT = r"re-entrant.*use_reentrant=False, or a FisherMonitor around your own backward"


@kinds
@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (4, 4, 4)], ids=str)
def test_trap_09_checkpointed_blocks(use_reentrant: bool, shape: tuple[int, ...]) -> None:
    square = len(set(shape)) == 1
    model, x, y = drawn(Blocks(3, use_reentrant), *shape)
    plain = Blocks(3, None).double()
    plain.load_state_dict(model.state_dict())
    expected = per_sample_squared_norms(plain, numbers, x, y)
    # Where all sizes are the same, nothing but a backward pass of the library's own could tell where the samples are.
    refusal = r"shapes.*leave open where its 4 samples are.*use_reentrant=False" if use_reentrant and square else ""
    with expectation(refusal):
        monitor = assert_exact(model, x, y, report=False)
        mine = gradients(model)
        assert_equal(monitor.trace, total(trace(expected)), monitor.trace)
        model.zero_grad()
        numbers(model(x), y).backward()
        assert_same_gradients(mine, gradients(model))
    with expectation(refusal or (REENTRANT if use_reentrant else "")):
        assert_report_exact(model, x, y)


def test_trap_09_the_first_layer_in_a_checkpoint() -> None:
    """No gradient goes through it to where the layer's input would be asked for, and several passes ask."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.last(checkpoint(m.first, x, use_reentrant=False).tanh())

    model, x, y = drawn(Forward(forward, first=nn.Linear(4, 5), last=nn.Linear(5, 3)), 6, 4)
    assert_exact(model, x, y)
    report = fisher_report(model, None, (x, None), fisher="exact", progress=False)
    expected = trace(exact_fisher(model, x))
    for name, value in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), torch.float64)


def test_trap_09_reentrant_checkpoints_need_a_monitor() -> None:
    model, x, y = drawn(Blocks(2, True), 5, 4)
    with pytest.raises(CurvatureError, match=r"use_reentrant=False, or a FisherMonitor"):
        fisher_report(model, numbers, (x, y), progress=False)


UNREADABLE = r"{} used by \w+ inside of activation checkpointing .*register_rule, or run it without checkpointing"
UNACCOUNTED = r"reached {} by a way that nothing accounts for: .*inside of re-entrant checkpointing"
LAYER = r"body\.layer\.\w+, body\.layer\.\w+:?"


@pytest.mark.parametrize(
    ("inside", "use_reentrant", "monitor", "report"),
    [
        ("module", False, "", ""),
        ("module", True, "", REENTRANT),
        ("function", False, UNREADABLE.format(LAYER), UNREADABLE.format(LAYER)),
        ("function", True, UNACCOUNTED.format(LAYER), REENTRANT),
        ("raw", False, UNREADABLE.format(r"body\.gain:"), UNREADABLE.format(r"body\.gain:")),
        ("raw", True, UNACCOUNTED.format(r"body\.gain"), REENTRANT),
    ],
)
def test_trap_09_uses_without_a_rule_inside_a_checkpoint(
    inside: str, use_reentrant: bool, monitor: str, report: str
) -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gain = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            if inside == "module":
                return self.layer(x).tanh()
            if inside == "function":
                return F.linear(x, self.layer.weight, self.layer.bias).tanh()
            return self.layer(x) * self.gain

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(checkpoint(m.body, m.first(x), use_reentrant=use_reentrant))

    model, x, y = drawn(Forward(forward, first=nn.Linear(4, 4), body=Body(), last=nn.Linear(4, 2)), 5, 4)
    with expectation(monitor):
        assert_exact(model, x, y, report=False)
    with expectation(report):
        assert_report_exact(model, x, y)


@kinds
def test_trap_09_one_module_in_a_checkpoint_and_outside(use_reentrant: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.layer(checkpoint(m.layer, m.first(x).tanh(), use_reentrant=use_reentrant).tanh())

    model, x, y = drawn(Forward(forward, first=nn.Linear(4, 4), layer=nn.Linear(4, 4)), 5, 4)
    assert_exact(model, x, y, report=False)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_trap_09_dropout_in_a_checkpoint(dropout: float) -> None:
    """Its draws are replayed."""
    model = Blocks(2, False)
    for block in model.blocks:
        block.insert(1, nn.Dropout(dropout))
    model, x, y = drawn(model.train(), 5, 4)
    torch.manual_seed(3)
    expected = of_one_graph(model, (model(x) - y).square().flatten(1).sum(1))
    torch.manual_seed(3)
    with FisherMonitor(model) as monitor:
        numbers(model(x), y).backward()
    for name, t in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), t.mean(), monitor.trace)


@kinds
def test_trap_09_checkpointing_still_saves_memory(use_reentrant: bool) -> None:
    """What a checkpoint throws away after the forward pass is gone under the monitor too."""
    model, x, y = drawn(Blocks(2, use_reentrant), 5, 4)
    alive: list[weakref.ref[Tensor]] = []

    def remember(module: nn.Module, args: Any, output: Tensor) -> None:
        alive.append(weakref.ref(args[0]))

    handles = [block[3].register_forward_hook(remember) for block in model.blocks]
    with FisherMonitor(model):
        loss = numbers(model(x), y)
        gc.collect()
        assert len(alive) == 2
        assert all(tensor() is None for tensor in alive)
        loss.backward()
    for handle in handles:
        handle.remove()


# 10. Settings that a formula forgets


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_trap_10_settings_that_formulas_forget() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.embedding((x[:, 0, 0, :2] * 3).long().abs() % 5).sum(1)
        h = m.circular(x + h[:, :, None, None]).tanh()
        h = m.norm(m.transposed(m.even(m.depthwise(h))))
        return m.head(h.flatten(2).transpose(1, 2))

    model = Forward(
        forward,
        embedding=nn.Embedding(5, 2, padding_idx=0),
        circular=nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", bias=False),
        depthwise=nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=4, padding_mode="reflect"),
        even=nn.Conv2d(8, 4, 2, padding="same", groups=2),
        transposed=nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, padding=1, groups=2),
        norm=nn.BatchNorm2d(6, eps=0.1),
        head=nn.Linear(6, 3, bias=False),
    ).eval()
    assert_exact(*drawn(model, 4, 2, 6, 6))


@pytest.mark.parametrize("options", [{"ignore_index": 1}, {"weight": torch.tensor([0.3, 1.0, 2.0])}], ids=str)
def test_trap_10_normalisers_that_are_not_the_number_of_samples(options: dict[str, Any]) -> None:
    model, x, _ = drawn(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), 7, 4)
    y = torch.tensor([0, 1, 2, 1, 0, 2, 2])
    loss_fn = nn.CrossEntropyLoss(**options).double()
    expected = per_sample_squared_norms(model, loss_fn, x, y, shares_of="mean")
    with FisherMonitor(model) as monitor:
        loss_fn(model(x), y).backward()
    for name, t in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), t.mean(), monitor.trace)


# 11. torch.compile, and wrappers


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "compiled_before"])
@pytest.mark.parametrize("how", ["wrapped", "in_place", "submodule"])
def test_trap_11_a_compiled_model(how: str, warm: bool, backend: str) -> None:
    torch._dynamo.reset()
    model, x, y = drawn(small(), 5, 4)
    expected = per_sample_squared_norms(model, numbers, x, y)
    if how == "wrapped":
        compiled: Any = torch.compile(model, backend=backend)
    elif how == "in_place":
        compiled = copy.deepcopy(model)
        compiled.compile(backend=backend)
    else:
        compiled = nn.Sequential(copy.deepcopy(model), nn.Identity())
        compiled[0].compile(backend=backend)
        expected = {f"0.{name}": t for name, t in expected.items()}
    if warm:
        numbers(compiled(x), y).backward()
    # What was compiled before there were hooks calls none; a report runs the model that was compiled, as it was written.
    refusal = r"by a way that nothing accounts for: .*in compiled code" if how == "wrapped" and warm else ""
    try:
        with expectation(refusal):
            with FisherMonitor(compiled) as monitor:
                numbers(compiled(x), y).backward()
            for name, t in expected.items():
                assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), t.mean(), monitor.trace)
        assert_report_exact(compiled, x, y, expected=expected)
    finally:
        torch._dynamo.reset()


def test_trap_11_data_parallel_is_refused() -> None:
    model = nn.DataParallel(small())
    with pytest.raises(CurvatureError, match=r"DataParallel.*DistributedDataParallel"):
        FisherMonitor(model)
    with pytest.raises(CurvatureError, match=r"DataParallel"):
        fisher_report(model, numbers, (torch.randn(5, 4), torch.randn(5, 3)), progress=False)


# 12. Half precision


def language_model() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(11, 16), nn.Embedding(6, 16)
            self.body = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.gain = nn.Parameter(torch.ones(16))
            self.head = nn.Linear(16, 11, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.body(self.words(ids) + self.places(torch.arange(ids.shape[1]))) * self.gain)

    return Model()


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast("cpu", dtype):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 4096.0])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_trap_12_autocast_and_scaled_losses(dtype: torch.dtype, scale: float, backward_inside: bool) -> None:
    model, ids, y = language_model(), torch.randint(11, (5, 6)), torch.randint(11, (5, 6))

    def loss(rows: slice) -> Tensor:
        with autocast(dtype):
            outputs = model(ids[rows])
        return F.cross_entropy(outputs.float().transpose(1, 2), y[rows])

    expected = {name: torch.zeros(()).double() for name, _ in model.named_parameters()}
    for n in range(5):
        model.zero_grad()
        (loss(slice(n, n + 1)) * scale).backward()
        for name, p in model.named_parameters():
            expected[name] += (p.grad.double() / scale).square().sum() / 5
    with FisherMonitor(model, loss_scale=scale) as monitor:
        if backward_inside:
            with autocast(dtype):
                (loss(slice(None)) * scale).backward()
        else:
            (loss(slice(None)) * scale).backward()
    for name, value in expected.items():
        found = float(monitor.report().loc[name, "fisher_trace"])
        assert found == pytest.approx(float(value), rel=1e-2, abs=1e-5 * float(total(expected))), name


def test_trap_12_a_grad_scaler() -> None:
    model, x, y = small(), torch.randn(6, 4), torch.randn(6, 3)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.0), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    expected = total(trace(per_sample_squared_norms(model, numbers, x, y)))
    with FisherMonitor(model, loss_scale=scaler.get_scale) as monitor:
        for part in (slice(0, 2), slice(2, 6)):
            scaler.scale(numbers(model(x[part]), y[part])).backward()
            scaler.step(optimizer)
            scaler.update(2.0**10)
    assert float(monitor.trace) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_trap_12_a_model_in_half_precision_neither_overflows_nor_underflows(dtype: torch.dtype) -> None:
    model = language_model().to(dtype)
    ids, y = torch.randint(11, (5, 6)), torch.randint(11, (5, 6))

    def loss(scale: float, rows: slice) -> Tensor:
        return F.cross_entropy(model(ids[rows]).float().transpose(1, 2), y[rows]) * scale

    for scale in (2.0**-6, 1.0, 2.0**9):
        expected = torch.zeros(()).double()
        for n in range(5):
            model.zero_grad()
            loss(scale, slice(n, n + 1)).backward()
            expected += sum((p.grad.double() / scale).square().sum() for p in model.parameters()) / 5
        with FisherMonitor(model, loss_scale=scale) as monitor:
            loss(scale, slice(None)).backward()
        assert monitor.trace.dtype in (torch.float32, torch.float64)
        assert float(monitor.trace) == pytest.approx(float(expected), rel=5e-2)


# 13. Cancellation


def test_trap_13_gradients_that_nearly_cancel() -> None:
    """Two positions with opposite gradients and nearly equal inputs, in a layer, and between two uses of a tied weight."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 20, bias=False)
    x = torch.randn(4, 1, 24).repeat(1, 2, 1)
    x[:, 1] += 1e-2 * torch.randn(4, 24)
    model = Forward(lambda m, x: m.layer(x[:, :1]) - F.linear(x[:, 1:], m.layer.weight), layer=layer)
    y = torch.randn(4, 1, 20)

    def linear(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * targets).flatten(1).sum(1).mean()

    expected = trace(per_sample_squared_norms(model, linear, x, y))
    with FisherMonitor(model, per_sample=True) as monitor:
        linear(model(x), y).backward()
    assert (monitor.per_sample >= 0).all(axis=None)
    assert_equal(
        torch.tensor(monitor.report().loc["layer.weight", "fisher_trace"]), expected["layer.weight"], 0, torch.float32
    )


# 14. Exceptions, copies, several monitors


def test_trap_14_two_monitors_and_copies_of_a_model_that_needs_the_graph() -> None:
    model = Square(4)
    model, x, y = drawn(model, 4, 4)
    expected = per_sample_squared_norms(model, numbers, x, y)
    with FisherMonitor(model, per_sample=True) as one:
        with FisherMonitor(model, reduction="sum", diagonal=True) as two:
            numbers(model(x), y).backward()
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved_and_loaded(model)]
        for twin in twins:
            numbers(twin(x), y).backward()
        numbers(model(x), y).backward()
    for twin in twins:
        assert_same_gradients(gradients(twin), gradients(twins[0]))
    for name, t in expected.items():
        mine = torch.tensor(one.per_sample[name].to_numpy())
        assert_equal(mine, t.repeat(2), one.trace * 8)
        summed = t.sum() / 16  # that loss was a mean
        assert_equal(torch.tensor(two.report().loc[name, "fisher_trace"]), summed, two.trace, torch.float64)
        assert_equal(two.diagonal[name].sum(), summed, two.trace)
    assert not any(hooks(model).values())


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_trap_14_an_exception_in_the_middle_of_a_model_that_needs_the_graph() -> None:
    model, x, y = drawn(Square(4), 4, 4)
    expected = per_sample_squared_norms(model, numbers, x, y)
    with FisherMonitor(model) as monitor:
        handle = model.conv.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x)
        handle.remove()
        model(x)
        numbers(model(x), y).backward()
    assert_equal(monitor.trace, total(trace(expected)), monitor.trace)
    assert not any(hooks(model).values())


# 15. The user's training is as without it


def test_trap_15_training_of_a_model_that_needs_the_graph_is_bit_identical() -> None:
    def trained(monitored: bool) -> tuple[nn.Module, list[Any]]:
        torch.manual_seed(5)
        model, seen = randomised(Square(4)), []
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        with FisherMonitor(model, loss_scale=0.5, diagonal=True) if monitored else copy.copy(NOTHING):
            for _ in range(3):
                optimizer.zero_grad()
                for _ in range(2):
                    (numbers(model(torch.randn(4, 4)), torch.zeros(4, 4, 4)) / 2).backward()
                seen.append(gradients(model))
                optimizer.step()
        return model, seen

    (model, seen), (plain, plain_seen) = trained(True), trained(False)
    for mine, theirs in zip(seen, plain_seen, strict=True):
        assert_same_gradients(mine, theirs)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), name


class Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *exc_info: object) -> None: ...


NOTHING = Nothing()


# 16. Random draws and routing


class Noisy(nn.Module):
    """Dropout before, in and after everything, parameters included, and a router."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, num_layers=2, dropout=0.3, batch_first=True)
        self.experts, self.router = nn.Parameter(torch.zeros(3, 8, 8)), nn.Linear(8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x + F.dropout(self.places(torch.arange(x.shape[1])), 0.3, self.training)
        h = h + self.attention(h, h, h)[0]
        h = F.dropout(self.recurrent(h)[0], 0.3, self.training).flatten(0, 1)
        scores, chosen = self.router(h).softmax(-1).max(-1)
        routed = torch.zeros_like(h)
        for expert in range(3):
            rows = (chosen == expert).nonzero().squeeze(1)
            out = F.linear(h[rows], F.dropout(self.experts[expert], 0.3, self.training)) * scores[rows, None]
            routed = routed.index_add(0, rows, out)
        return self.head(h + routed).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_trap_16_random_draws_and_routing_are_those_of_the_users_forward(dtype: torch.dtype) -> None:
    model, x, y = drawn(Noisy().train(), 5, 6, 8)
    model, x, y = model.to(dtype), x.to(dtype), y.to(dtype)
    torch.manual_seed(3)
    expected = of_one_graph(model, (model(x) - y).square().flatten(1).sum(1))
    torch.manual_seed(3)
    plain = torch.randn(2)
    torch.manual_seed(3)
    model(x)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    with FisherMonitor(model) as monitor:
        numbers(model(x), y).backward()
    assert torch.equal(torch.get_rng_state(), after), "the monitor draws nothing"
    assert plain.shape == (2,)
    for name, t in expected.items():
        found = torch.tensor(monitor.report().loc[name, "fisher_trace"])
        assert_equal(found, t.mean(), total(trace(expected)), dtype)


class Routed(nn.Module):
    """Experts that get as many rows as fall to them, none in most batches; or each sample's rows in a call of its own."""

    def __init__(self, expert: Callable[[], nn.Module], way: str) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(6, 5), nn.ModuleList([expert() for _ in range(5)])
        self.head, self.way = nn.Linear(6, 3), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "experts":
            rows = x.flatten(0, 1)
            chosen, found = self.router(rows).argmax(1), torch.zeros_like(rows)
            for number, expert in enumerate(self.experts):
                mine = (chosen == number).nonzero().squeeze(1)
                found = found.index_add(0, mine, expert(rows[mine]).tanh())
            return self.head(found.view_as(x).mean(1))
        if self.way == "sample":  # as many rows as features, whose axes must not be confused
            return self.head(torch.stack([self.experts[0](rows).tanh().mean(0) for rows in x]))
        return self.head(torch.cat([self.experts[0](row).tanh() for row in x[:, 0].split(1)]))


EXPERTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 6),
    "layer norm": lambda: nn.LayerNorm(6),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "running statistics": lambda: nn.BatchNorm1d(6).eval(),
    "slopes": lambda: nn.PReLU(6),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 2, 3, padding=1), nn.Flatten()),
}


@pytest.mark.parametrize("way", ["experts", "sample", "row"])
@pytest.mark.parametrize("name", EXPERTS)
def test_trap_16_rows_of_one_sample_and_no_rows(name: str, way: str) -> None:
    torch.manual_seed(3)
    assert_exact(*drawn(Routed(EXPERTS[name], way), 4, 6, 6))


class Scaled(nn.Module):
    """Like many norms: a weight times something that is not its own business, and not the same thing in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, gate: Tensor | None = None, *, power: float = 1.0) -> Tensor:
        x = x if gate is None else x * F.silu(gate)
        n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) ** power
        return F.dropout(n, 0.5, self.training) * self.weight


def calls_of_scaled() -> Iterator[Any]:
    yield pytest.param(lambda m, x: m.two(m.scaled(m.one(x), x)), id="second argument")
    yield pytest.param(lambda m, x: m.two(m.scaled(m.one(x), gate=x)), id="keyword")
    yield pytest.param(lambda m, x: m.two(m.scaled(x=m.one(x), power=0.5)), id="all by keyword")


@pytest.mark.parametrize("forward", list(calls_of_scaled()))
def test_trap_16_a_norm_with_several_arguments(forward: Any) -> None:
    model, x, y = drawn(Forward(forward, one=nn.Linear(4, 4), scaled=Scaled(), two=nn.Linear(4, 3)), 5, 2, 4)
    assert_exact(model.eval(), x, y)


def test_trap_16_a_layer_that_begins_to_draw_random_numbers() -> None:
    """Deterministic when the monitor was entered, and for several batches."""
    model, x, y = drawn(nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Linear(4, 3)), 5, 4)
    model.train()
    torch.manual_seed(3)
    expected = of_one_graph(model, (model(x) - y).square().flatten(1).sum(1))
    model.eval()
    with FisherMonitor(model, per_sample=True) as monitor:
        for _ in range(3):
            numbers(model(x), y).backward()
        model.train()
        torch.manual_seed(3)
        numbers(model(x), y).backward()
    for name, t in expected.items():
        assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()[-5:]), t, monitor.trace)


# What is slow says so


class Angle(nn.Module):
    """An operation that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.atan2(x, self.weight)


def test_a_fallback_that_dominates_warns_once() -> None:
    model, x, y = drawn(Angle(), 5, 4)
    with pytest.warns(SlowFallbackWarning, match=r"atan2.*register_rule") as warned, FisherMonitor(model) as monitor:
        for _ in range(3):
            numbers(model(x), y).backward()
    assert len(warned) == 1
    assert monitor.report().loc["weight", "rule"].startswith("atan2, one sample at a time")
    assert_exact(model, x, y)


@pytest.mark.parametrize("equation", ["nti,oi->nto", "tni,oi->nto", "nti,kio->nkto"])
def test_an_einsum_with_a_weight(equation: str) -> None:
    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(*([2, 4, 3] if "k" in equation else [3, 4])))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, x.transpose(0, 1) if equation[0] == "t" else x, self.weight)

    model, x, y = drawn(Einsum(), 5, 6, 4)
    assert_exact(model, x, y)
    with FisherMonitor(model) as monitor:
        numbers(model(x), y).backward()
    assert "one sample" not in monitor.report().loc["weight", "rule"]


# 5 and 3 once more: shapes that lie, and ways around the outputs


def test_trap_05_features_on_the_first_axis_as_many_as_samples() -> None:
    """No tensor has as many indices on another axis, so that the shapes show no doubt."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.layer(x.permute(2, 0, 1).reshape(4, -1, 1)).tanh().sum(0).view(-1, 6)

    assert_exact(*drawn(Forward(forward, layer=nn.Linear(1, 1)), 4, 6, 4))


def test_trap_03_a_loss_on_what_the_model_keeps_to_itself() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.aside = self.layer(x.transpose(0, 1)).transpose(0, 1)
            return x

    model, x, _ = drawn(Aside(), 5, 5, 4)
    with FisherMonitor(model), pytest.raises(CoverageError, match=r"layer.*return"):
        model(x)
        model.aside.square().mean().backward()
    assert model.layer.weight.grad is not None


def test_trap_05_parts_called_one_by_one_are_refused_or_told() -> None:
    model, x, y = drawn(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), 5, 4)
    with FisherMonitor(model), pytest.raises(ShapeError, match=r"batch_axis=0"):
        model[1](model[0](x))
    with FisherMonitor(model, batch_axis=0) as monitor:
        numbers(model[1](model[0](x)), y).backward()
    expected = float(monitor.trace)
    with FisherMonitor(model) as monitor:
        numbers(model(x), y).backward()
    assert float(monitor.trace) == pytest.approx(expected, rel=1e-12)


def test_a_table_that_its_forward_rewrites_is_put_back() -> None:
    model = nn.Embedding(5, 4, max_norm=0.5)
    before = model.weight.detach().clone()
    fisher_report(model, lambda out, _: out.square().mean(), (torch.arange(5), None), progress=False)
    assert torch.equal(model.weight, before)


def test_trap_05_a_model_that_changes_its_batch_axis() -> None:
    """What was found out in earlier batches must not be believed of another graph."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.layer(x.transpose(0, 1)).transpose(0, 1) if m.flipped else m.layer(x)

    model = Forward(forward, layer=nn.Linear(4, 3))
    model.flipped = False
    model, x, y = drawn(model, 5, 5, 4)
    monitor, traces = FisherMonitor(model), []
    for model.flipped in (False, True, False):
        monitor.reset()
        with monitor:
            numbers(model(x).tanh(), y).backward()
        traces.append(float(monitor.trace))
    assert traces == pytest.approx([traces[0]] * 3, rel=1e-12)


class Opposite(nn.Module):
    """Two equal and opposite halves of a large output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(6, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        z = (self.first(x) * self.scale).repeat(1, 2**16)
        return torch.cat([z, -z], 1)


def test_large_outputs_of_two_opposite_halves_show_their_samples() -> None:
    assert_exact(*drawn(Opposite(), 5, 6))


class WithNothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(6, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x) * self.scale
        return h, h[:, :0]


@pytest.mark.parametrize("n", [5, 9])
def test_an_output_without_elements_beside_another(n: int) -> None:
    model, x, y = randomised(WithNothing()).double(), torch.randn(n, 6).double(), torch.randn(n, 4).double()
    assert_exact(model, x, y, lambda outputs, targets: numbers(outputs[0], targets))


class Recomputed(nn.Module):
    """Inputs that die in the backward pass, one checkpointed block after the other, so that new ones get their ids."""

    def __init__(self, blocks: int = 12) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8) for _ in range(3)]) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(partial(self._mixed, block), x, use_reentrant=True)
        return x

    def _mixed(self, block: nn.ModuleList, x: Tensor) -> Tensor:
        h = x.tanh().mT.contiguous().mT
        return x + block[0](h) * block[1](h).sigmoid() + block[2](h)


def test_inputs_are_not_shared_where_checkpoints_run_blocks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An id is a tensor's as long as that lives."""
    shared: list[object] = []
    monkeypatch.setattr(
        "torch_secorder.capture.records.SharedFactor", lambda value: shared.append(value) or SharedFactor(value)
    )
    model, x, y = drawn(Recomputed(), 3, 4, 8)
    expected = per_sample_squared_norms(model, numbers, x, y)
    with FisherMonitor(model, per_sample=True) as monitor:
        for _ in range(12):
            numbers(model(x), y).backward()
    for name, t in expected.items():
        everything = total(trace(expected)) * len(t)
        assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()), t.repeat(12), everything, torch.float64)
    assert not shared
