"""Trap 9: activation checkpointing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from expectations import expectation
from model_state import assert_same_gradients, gradients
from oracles import assert_equal, exact_fisher, per_sample_squared_norms, total, trace
from problems._base import Forward
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report
from torch_secorder.autograd.self_test import hooks_are_seen
from torch_secorder.errors import CurvatureError
from torch_secorder.per_sample import SharedFactor
from traps.exactness import assert_exact, assert_report_exact, drawn, numbers, of_one_graph

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # re-entrant checkpoints


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
    assert_report_exact(model, x, y)  # in the library's own run the checkpoints are not re-entrant
    assert_equal(empirical_fisher_trace(model, numbers, x, y), total(trace(expected)), total(trace(expected)))


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


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no")


def test_trap_09_the_users_checkpoints_stay_what_they_are() -> None:
    """After a run of the library's, also one that raises, and in other threads meanwhile."""
    usual, seen = torch.utils.checkpoint.CheckpointFunction, []
    model, x, y = drawn(Blocks(2, True), 5, 4)

    def elsewhere(*_: object) -> None:
        with ThreadPoolExecutor() as threads:
            seen.append(
                threads.submit(lambda: checkpoint(model.first, x.clone().requires_grad_(), use_reentrant=True)).result()
            )

    handle = model.blocks[0].register_forward_hook(elsewhere)
    assert_report_exact(model, x, y)
    handle.remove()
    assert {output.grad_fn.name() for output in seen} == {"CheckpointFunctionBackward"}
    assert torch.utils.checkpoint.CheckpointFunction is usual
    model.blocks[1] = Fails()
    with pytest.raises(ValueError, match="no"):
        fisher_report(model, numbers, (x, y), progress=False)
    assert torch.utils.checkpoint.CheckpointFunction is usual


def test_trap_09_what_a_reentrant_checkpoint_gives_no_gradient_has_none() -> None:
    """Its input needs none, so that its output has none: so it is in the user's training, too."""
    model, x, y = drawn(
        Forward(
            lambda m, x: m.last(checkpoint(m.first, x, use_reentrant=True) + x),
            first=nn.Linear(4, 4),
            last=nn.Linear(4, 3),
        ),
        5,
        4,
    )
    report = fisher_report(model, numbers, (x, y), progress=False)
    assert (report.loc[["first.weight", "first.bias"], "rule"] == "unused").all()
    assert report["fisher_trace"].sum() > 0


def test_trap_09_other_functions_that_checkpoint_need_a_monitor() -> None:
    model, x, y = drawn(
        Forward(
            lambda m, x: m.last(CheckpointFunction.apply(m.body, True, m.first(x))),
            **{name: nn.Linear(4, 4) for name in ("first", "body", "last")},
        ),
        *(5, 4),
    )
    with pytest.raises(CurvatureError, match=REENTRANT):
        fisher_report(model, numbers, (x, y), progress=False)
    assert_exact(model, x, y, report=False)


UNREADABLE = r"{} used by \w+ inside of activation checkpointing .*register_rule, or run it without checkpointing"


# Where torch does not show that hooks keep what a node has saved, the attempt to read it shows it.
WITHOUT_A_SIGN = r"gradients of body\.layer\.bias, body\.layer\.weight apart by samples raised CheckpointError"


UNACCOUNTED = r"reached parameters? {} by a way that nothing accounts for: .*inside of re-entrant checkpointing"


LAYER = r"body\.layer\.\w+, body\.layer\.\w+:?"
OF_FUNCTION = UNREADABLE.format(LAYER) if hooks_are_seen() else WITHOUT_A_SIGN


@pytest.mark.parametrize(
    ("inside", "use_reentrant", "monitor", "report"),
    [
        ("module", False, "", ""),
        ("module", True, "", ""),
        ("function", False, OF_FUNCTION, OF_FUNCTION),
        ("function", True, UNACCOUNTED.format(LAYER), OF_FUNCTION),
        ("raw", False, UNREADABLE.format(r"body\.gain:"), UNREADABLE.format(r"body\.gain:")),
        ("raw", True, UNACCOUNTED.format(r"body\.gain"), UNREADABLE.format(r"body\.gain:")),
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


@kinds
@pytest.mark.parametrize("inside", [True, False], ids=["order changes inside", "order changes before"])
def test_trap_09_samples_in_another_order_in_a_checkpoint(inside: bool, use_reentrant: bool) -> None:
    """A re-entrant checkpoint hides the order of its samples, which is refused where nodes behind it show another one."""
    orders = [torch.arange(5)]

    def forward(m: Any, x: Tensor) -> Tensor:
        order = orders[-1] if len(x) == 5 else torch.arange(len(x))
        h = m.layer(m.first(x).tanh())
        given = h if inside else h[order]
        h = checkpoint(lambda h: m.layer((h[order] if inside else h).tanh()), given, use_reentrant=use_reentrant)
        return m.last(h[order.argsort()])

    model, x, _ = drawn(Forward(forward, first=nn.Linear(3, 6), layer=nn.Linear(6, 6), last=nn.Linear(6, 2)), 5, 3)
    in_order, reordered = torch.arange(5), torch.tensor([3, 0, 4, 1, 2])
    for order in (in_order, in_order, in_order, reordered, in_order, reordered):
        orders.append(order)
        refused = use_reentrant and order is reordered
        with FisherMonitor(model) as monitor, expectation("leave open where its 5 samples are" if refused else ""):
            model(x).square().sum(1).mean().backward()
        if not refused:
            for name, t in per_sample_squared_norms(model, lambda o, _: o.square().sum(), x, x).items():
                assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), t.mean(), monitor.trace)


def restored(m: Any, h: Tensor, order: Tensor) -> Tensor:
    return checkpoint(lambda h: m.layer(h[order]).tanh()[order.argsort()], h, use_reentrant=True)


def by_a_matrix(m: Any, h: Tensor, order: Tensor) -> Tensor:
    matrix = torch.eye(len(order), dtype=h.dtype)[order]
    return checkpoint(lambda h: matrix.T @ m.layer(matrix @ h).tanh(), h, use_reentrant=True)


def by_another_checkpoint(m: Any, h: Tensor, order: Tensor) -> Tensor:
    moved = checkpoint(lambda h: h[order], h, use_reentrant=True)
    return checkpoint(lambda h: h[order.argsort()], m.layer(moved).tanh(), use_reentrant=True)


def nested(m: Any, h: Tensor, order: Tensor) -> Tensor:
    return checkpoint(lambda h: restored(m, h, order), h, use_reentrant=True)


def between(m: Any, h: Tensor, order: Tensor) -> Tensor:
    """What is behind a checkpoint is hidden, so that only labels tell that a matrix may have moved samples there."""
    matrix = torch.eye(len(order), dtype=h.dtype)[order]
    h = matrix.T @ m.layer(matrix @ h)
    return checkpoint(torch.tanh, h, use_reentrant=True)


def after(m: Any, h: Tensor, order: Tensor) -> Tensor:
    """All layers are inside, so that nothing in the outputs' graph needs to be placed."""
    return checkpoint(lambda h: m.layer(h[order]).tanh(), h, use_reentrant=True)[order.argsort()]


@pytest.mark.parametrize("way", [restored, by_a_matrix, by_another_checkpoint, nested, between, after])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_trap_09_samples_in_another_order_for_a_while(way: Callable[[Any, Tensor, Tensor], Tensor], tied: bool) -> None:
    """Inside of a re-entrant checkpoint the order may change between looks; what it is has to be seen in each pass."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x) if tied or way is not after else x.clone().requires_grad_()
        order = x[:, 0].argsort()
        return m.last((m.layer(h) if tied else h) + way(m, h, order))

    model = Forward(forward, first=nn.Linear(4, 4), layer=nn.Linear(4, 4), last=nn.Linear(4, 2)).double()
    refused = 0
    with FisherMonitor(model, per_sample=True) as monitor:
        for step in range(1, 19):
            x, y = torch.randn(5, 4).double(), torch.randn(5, 2).double()
            x = x[x[:, 0].argsort()] if step in (1, 2, 3, 5, 9, 17) else x
            monitor.reset()
            model.zero_grad()
            try:
                numbers(model(x), y).backward()
            except CurvatureError as error:
                assert "use_reentrant=False" in str(error)
                refused += 1
                continue
            expected = per_sample_squared_norms(model, numbers, x, y)
            assert list(expected) == list(monitor.per_sample)
            for name, t in expected.items():
                found = torch.from_numpy(monitor.per_sample[name].to_numpy(copy=True))
                assert_equal(found, t, 5 * total(trace(expected)), torch.float64)
    # With a matrix nothing shows that the samples are apart; with an index they are seen to be in order.
    assert refused == (18 if way in (by_a_matrix, between) else 12)


class TurnedAround(torch.autograd.Function):
    """Rows, in the opposite order if a tensor that it has saved says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: Tensor) -> Tensor:
        ctx.save_for_backward(turns)
        return x.flip(0) if turns else x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (turns,) = ctx.saved_tensors
        return grads[0].flip(0) if turns else grads[0] * 1, None


def itself(x: Tensor) -> Tensor:
    return x


# A function is called to know where it puts samples, unless hooks keep what it has saved, or torch does not show that none do.
UNASKED = r"torch\.autograd\.Function inside of re-entrant .* can't be called to know, since hooks may keep"
OUT_OF_ORDER = r"samples are put into another order.*hidden by re-entrant"


@pytest.mark.parametrize(
    ("turns", "hooked", "refusal"),
    [
        (False, False, "" if hooks_are_seen() else UNASKED),
        (True, False, OUT_OF_ORDER if hooks_are_seen() else UNASKED),
        (False, True, UNASKED),
        (True, True, UNASKED),
    ],
)
def test_trap_09_a_function_of_the_users_in_a_reentrant_checkpoint(turns: bool, hooked: bool, refusal: str) -> None:
    def body(m: Any, h: Tensor) -> Tensor:
        with saved_tensors_hooks(itself, itself) if hooked else nullcontext():
            moved = TurnedAround.apply(h, torch.tensor(turns and len(h) > 1))
        return TurnedAround.apply(m.layer(moved).tanh(), torch.tensor(turns and len(h) > 1))

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        return m.last(m.layer(h) + (checkpoint(body, m, h, use_reentrant=True) if len(x) > 1 else body(m, h)))

    layers = {"first": nn.Linear(4, 4), "layer": nn.Linear(4, 4), "last": nn.Linear(4, 2)}
    model, x, y = drawn(Forward(forward, **layers), 5, 4)
    with expectation(refusal):
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


@pytest.mark.slow
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


def test_trap_09_a_function_with_a_parameter_inside_a_checkpoint_and_outside() -> None:
    """What it has saved runs the checkpoint's layers again, which says nothing of the function: outside of one it is exact."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
            ctx.save_for_backward(x, gain)
            return x * gain

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, gain = ctx.saved_tensors
            return grad * gain, (grad * x).sum(0)

    class Body(nn.Module):
        def __init__(self, *, checkpointed: bool) -> None:
            super().__init__()
            self.gain, self.layer, self.checkpointed = nn.Parameter(torch.rand(4)), nn.Linear(4, 4), checkpointed

        def inside(self, x: Tensor) -> Tensor:
            return Scaled.apply(self.layer(x).tanh(), self.gain)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inside, x, use_reentrant=False) if self.checkpointed else self.inside(x)

    model, x, y = drawn(Body(checkpointed=True), 5, 4)
    # Where torch does not show that hooks keep what the function has saved, the function is taken for one that calls modules.
    hidden = "what shows it is hidden"
    with expectation(UNREADABLE.format("gain:") if hooks_are_seen() else hidden), FisherMonitor(model):
        numbers(model(x), y).backward()
    model.checkpointed = False
    if hooks_are_seen():
        assert_exact(model, x, y)
        return
    with expectation(hidden), FisherMonitor(model):
        numbers(model(x), y).backward()
