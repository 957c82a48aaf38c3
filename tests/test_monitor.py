"""FisherMonitor: what counts as a sample, what accumulates, what is refused, and that nothing is left behind."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from model_state import assert_same_gradients, assert_unchanged, gradients, hooks, state
from oracles import (
    activation_squared_norms,
    assert_equal,
    per_sample_gradients,
    per_sample_squared_norms,
    squared_norms,
    total,
    trace,
)
from torch_secorder import FisherMonitor
from torch_secorder.errors import CurvatureError, NonFiniteError
from torch_secorder.per_sample import Outer, outer

REDUCTIONS = ["mean", "sum"]
FIGURES = ["fisher_trace", "fisher_trace_stderr", "fisher_trace_share", "fisher_mean", "grad_sq_norm"]


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))


def cross_entropy(reduction: str = "mean", **options: Any) -> nn.Module:
    return nn.CrossEntropyLoss(reduction=reduction, **options)


def backward(model: nn.Module, x: Tensor, y: Tensor, reduction: str = "mean", scale: float = 1.0) -> None:
    (cross_entropy(reduction)(model(x), y) * scale).backward()


def norms(model: nn.Module, *batches: tuple[Tensor, Tensor], reduction: str = "mean") -> dict[str, Tensor]:
    """t_{n,p} of all the batches' samples, pooled."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return per_sample_squared_norms(model, cross_entropy(reduction), x, y)


def assert_report(monitor: FisherMonitor, squared: dict[str, Tensor], reduction: str = "mean") -> None:
    """The report's traces are those of per-sample squared norms t_{n,p}."""
    expected = trace(squared, reduction)
    report = monitor.report()
    assert list(report.index) == list(expected)
    for name, value in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), torch.float64)
    assert_equal(monitor.trace, total(expected), total(expected), torch.float64)
    assert monitor.n_samples == len(next(iter(squared.values())))


def assert_same_report(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a, b, rtol=1e-12, atol=0)
    assert a.attrs == b.attrs


# What is counted


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_batches_of_unequal_size_are_pooled(reduction: str) -> None:
    model, batches = classifier(), [batch(5), batch(3), batch(1)]
    with FisherMonitor(model, reduction=reduction) as monitor:
        for x, y in batches:
            backward(model, x, y, reduction)
    assert_report(monitor, norms(model, *batches), reduction)
    assert monitor.report().attrs["n_samples"] == 9
    assert monitor.report().attrs["n_passes"] == 3


def test_the_trace_is_not_the_squared_batch_gradient() -> None:
    model, (x, y) = classifier(), batch(8)
    with FisherMonitor(model) as monitor:
        backward(model, x, y)
    squared_batch_gradient = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert float(monitor.trace) > 1.5 * squared_batch_gradient


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{"weight": torch.tensor([0.2, 1.0, 3.0])}, {"ignore_index": 1}], ids=str)
def test_cross_entropy_with_another_normaliser(options: dict[str, Any], reduction: str) -> None:
    model, (x, y) = classifier(), batch(7)
    y[:3] = torch.tensor([0, 1, 2])
    loss_fn = cross_entropy(reduction, **options).double()
    with FisherMonitor(model, reduction=reduction) as monitor:
        loss_fn(model(x), y).backward()
    assert_report(monitor, per_sample_squared_norms(model, loss_fn, x, y, shares_of=reduction), reduction)


def test_positions_of_a_sequence_are_not_samples() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    ids, labels = torch.randint(7, (4, 6)), torch.randint(3, (4, 6))
    labels[0, :4] = -100
    loss_fn = cross_entropy()
    with FisherMonitor(model) as monitor:
        loss_fn(model(ids).transpose(1, 2), labels).backward()

    def swapped(outputs: Tensor, targets: Tensor) -> Tensor:
        return loss_fn(outputs.transpose(1, 2), targets)

    assert_report(monitor, per_sample_squared_norms(model, swapped, ids, labels, shares_of="mean"))
    assert monitor.n_samples == 4


def test_a_forward_that_no_backward_reaches_counts_for_nothing() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    with FisherMonitor(model) as monitor:
        model(second[0])
        backward(model, *first)
        model(second[0])
        with torch.no_grad():
            model(second[0])
    assert_report(monitor, norms(model, first))


def test_losses_of_earlier_forwards_may_be_differentiated_in_any_order() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    with FisherMonitor(model, per_sample=True) as monitor:
        losses = [cross_entropy()(model(x), y) for x, y in (first, second)]
        losses[1].backward()
        losses[0].backward()
    assert_report(monitor, norms(model, second, first))
    assert_equal(
        torch.tensor(monitor.per_sample["0.bias"].to_numpy()), norms(model, second, first)["0.bias"], monitor.trace * 8
    )


def test_the_report_may_be_read_inside_the_block() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    with FisherMonitor(model) as monitor:
        backward(model, *first)
        assert_report(monitor, norms(model, first))
        backward(model, *second)
        assert_report(monitor, norms(model, first, second))


def test_evaluation_inside_the_block_changes_nothing() -> None:
    model, data = classifier(), batch()
    with FisherMonitor(model) as monitor:
        backward(model, *data)
        with torch.inference_mode():
            model(data[0])
    assert_report(monitor, norms(model, data))


def test_only_the_first_layers_input_gradient_is_asked_for() -> None:
    """A saliency map inside the block gives samples too, but no parameter gradient to square."""
    model, (x, y) = classifier(), batch()
    x.requires_grad_()
    with FisherMonitor(model) as monitor:
        torch.autograd.grad(cross_entropy()(model(x), y), x)
    assert all(p.grad is None for p in model.parameters())
    assert_report(monitor, norms(model, (x.detach(), y)))
    assert monitor.report()["grad_sq_norm"].isna().all()


# loss_scale and gradient accumulation


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scale", [0.25, 1024, 1 / 3])
def test_a_loss_scale_is_undone(scale: float, reduction: str) -> None:
    model, data = classifier(), batch()
    with FisherMonitor(model, reduction=reduction) as plain:
        backward(model, *data, reduction)
    with FisherMonitor(model, reduction=reduction, loss_scale=scale, diagonal=True, per_sample=True) as scaled:
        backward(model, *data, reduction, scale)
    assert_report(scaled, norms(model, data), reduction)
    for figure in FIGURES:
        assert_equal(*(torch.tensor(m.report()[figure].to_numpy()) for m in (scaled, plain)), total=plain.trace)
    for name, t in norms(model, data).items():
        assert_equal(torch.tensor(scaled.per_sample[name].to_numpy()), t, plain.trace * 5)
        assert_equal(scaled.diagonal[name].sum(), trace({name: t}, reduction)[name], plain.trace)


def test_a_callable_loss_scale_is_read_at_each_backward() -> None:
    model, batches, scale = classifier(), [batch(5), batch(3)], [1.0]
    with FisherMonitor(model, loss_scale=lambda: scale[0]) as monitor:
        for factor, (x, y) in zip((8.0, 0.5), batches, strict=True):
            loss = cross_entropy()(model(x), y) * factor
            scale[0] = factor
            loss.backward()
            scale[0] = math.nan
    assert_report(monitor, norms(model, *batches))


def test_a_loss_scale_that_cannot_be_undone_is_refused() -> None:
    """The square of what undoes it is beyond the largest number of float64."""
    model, data = classifier(), batch()
    with pytest.raises(CurvatureError, match=r"loss_scale"), FisherMonitor(model, loss_scale=1e-282):
        backward(model, *data)


def training(monitored: bool) -> tuple[nn.Module, list[dict[str, Tensor | None]], FisherMonitor]:
    """Three optimizer steps of two accumulated micro-batches each."""
    torch.manual_seed(3)
    model = classifier().float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    monitor = FisherMonitor(model, loss_scale=0.5)
    seen = []

    def steps() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(2):
                x, y = batch(4)
                backward(model, x.float(), y, scale=0.5)
            seen.append(gradients(model))
            optimizer.step()

    if monitored:
        with monitor:
            steps()
    else:
        steps()
    return model, seen, monitor


def test_gradient_accumulation_and_optimizer_steps_inside_the_block() -> None:
    model, seen, monitor = training(monitored=True)
    plain, plain_seen, _ = training(monitored=False)
    for mine, theirs in zip(seen, plain_seen, strict=True):
        assert_same_gradients(mine, theirs)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert monitor.n_samples == 24
    assert monitor.report().attrs["n_passes"] == 6


def test_each_batch_is_measured_at_the_parameters_of_its_time() -> None:
    torch.manual_seed(5)
    model, batches, squared = classifier(), [batch(4), batch(4)], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with FisherMonitor(model) as monitor:
        for x, y in batches:
            squared.append(norms(model, (x, y)))
            optimizer.zero_grad(set_to_none=False)
            backward(model, x, y)
            optimizer.step()
    assert_report(monitor, {name: torch.cat([t[name] for t in squared]) for name in squared[0]})


# Lifecycle


@pytest.mark.parametrize("read", ["trace", "diagonal", "per_sample", "activations", "report"])
def test_reading_before_any_sample_raises(read: str) -> None:
    monitor = FisherMonitor(classifier(), diagonal=True, per_sample=True, activations=True)
    assert monitor.n_samples == 0
    with pytest.raises(CurvatureError, match=r"(?i)no sample|backward"):
        monitor.report() if read == "report" else getattr(monitor, read)


@pytest.mark.parametrize("read", ["diagonal", "per_sample", "activations"])
def test_reading_what_was_not_asked_for_raises(read: str) -> None:
    model = classifier()
    with FisherMonitor(model) as monitor:
        backward(model, *batch())
    with pytest.raises(CurvatureError, match=rf"{read}=True"):
        getattr(monitor, read)


def test_reset_forgets_and_starts_again() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    monitor = FisherMonitor(model, per_sample=True, diagonal=True)
    with monitor:
        backward(model, *first)
        monitor.reset()
        assert monitor.n_samples == 0
        with pytest.raises(CurvatureError, match=r"(?i)no sample"):
            _ = monitor.trace
        backward(model, *second)
    assert_report(monitor, norms(model, second))
    assert len(monitor.per_sample) == 3
    assert_equal(sum(d.sum() for d in monitor.diagonal.values()), monitor.trace, monitor.trace, torch.float64)


def test_entering_again_goes_on_accumulating() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    monitor = FisherMonitor(model)
    for data in (first, second):
        with monitor:
            backward(model, *data)
        assert not any(hooks(model).values())
        backward(model, *data)  # outside: counts for nothing
    assert_report(monitor, norms(model, first, second))


def test_nested_entry_raises_and_the_outer_block_goes_on() -> None:
    model, data = classifier(), batch()
    with FisherMonitor(model) as monitor:
        with pytest.raises(CurvatureError, match=r"(?i)nested|already|entered|active|inside"), monitor:
            pytest.fail("entered twice")
        backward(model, *data)
    assert_report(monitor, norms(model, data))
    assert not any(hooks(model).values())


def test_monitors_on_one_model_are_independent() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    with FisherMonitor(model) as outer:
        backward(model, *first)
        with FisherMonitor(model, reduction="mean", per_sample=True) as inner:
            backward(model, *second)
        assert any(hooks(model).values())
        inner.reset()
        backward(model, *second)
    assert_report(outer, norms(model, first, second, second))
    assert inner.n_samples == 0
    assert not any(hooks(model).values())


def test_monitors_may_be_left_in_another_order() -> None:
    model, data = classifier(), batch()
    one, two = FisherMonitor(model), FisherMonitor(model)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    backward(model, *data)
    two.__exit__(None, None, None)
    assert one.n_samples == 0
    assert_report(two, norms(model, data))
    assert not any(hooks(model).values())


def test_a_monitor_of_a_part_of_the_model() -> None:
    model, data = classifier(), batch()
    with FisherMonitor(model[2]) as monitor:
        backward(model, *data)
    squared = norms(model, data)
    assert_report(monitor, {name: squared[f"2.{name}"] for name in ("weight", "bias")})


# Where the samples are


class SequenceFirst(nn.Module):
    """Ids (T, N) to logits (T, N, 3), with layers that work on either layout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.block = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.block(self.norm(self.embedding(ids))).tanh()
        return self.head(self.inner(h.transpose(0, 1)).transpose(0, 1).tanh())


class BatchFirst(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(ids.T).transpose(0, 1).transpose(1, 2)


@pytest.mark.parametrize("shape", [(6, 4), (5, 5)], ids=str)
def test_the_batch_axis_of_every_module(shape: tuple[int, int]) -> None:
    model, ids, y = SequenceFirst().double(), torch.randint(7, shape), torch.randint(3, shape)
    axes = {"": 1, "inner": 0, **dict.fromkeys(["embedding", "norm", "block", "head"], 1)}
    with FisherMonitor(model, batch_axis=axes, per_sample=True, diagonal=True) as monitor:
        cross_entropy()(model(ids).flatten(0, 1), y.flatten()).backward()
    squared = per_sample_squared_norms(BatchFirst(model), cross_entropy(), ids.T, y.T)
    squared = {name.removeprefix("body."): t for name, t in squared.items()}
    assert_report(monitor, squared)
    for name, t in squared.items():
        assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()), t, monitor.trace)
        assert_equal(monitor.diagonal[name].sum(), t.mean(), monitor.trace)


def test_one_batch_axis_for_all() -> None:
    model, x, y = nn.Linear(4, 3).double(), torch.randn(6, 5, 4).double(), torch.randn(6, 5, 3).double()
    with FisherMonitor(model, batch_axis=1) as monitor:
        nn.MSELoss()(model(x), y).backward()
    assert_report(monitor, per_sample_squared_norms(model, nn.MSELoss(), x.transpose(0, 1), y.transpose(0, 1)))


@pytest.mark.parametrize(
    ("batch_axis", "message"),
    [
        ({"3": 1}, r"batch_axis.*3"),
        ("0", r"batch_axis"),
        (True, r"batch_axis"),
        ([], r"batch_axis"),
        (-2, r"batch_axis.*-2"),
        ({"": -1}, r"batch_axis.*-1"),
    ],
    ids=str,
)
def test_a_batch_axis_that_means_nothing(batch_axis: Any, message: str) -> None:
    with pytest.raises(CurvatureError, match=message) as raised:
        FisherMonitor(classifier(), batch_axis=batch_axis)
    assert isinstance(raised.value, ValueError)


# Merging and saving


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_merging_pools_the_samples(reduction: str) -> None:
    model, batches = classifier(), [batch(5), batch(3), batch(2)]
    options: dict[str, Any] = {"reduction": reduction, "diagonal": True, "per_sample": True}
    parts = []
    for x, y in batches:
        with FisherMonitor(model, **options) as part:
            backward(model, x, y, reduction)
        parts.append(part)
    with FisherMonitor(model, **options) as whole:
        for x, y in batches:
            backward(model, x, y, reduction)
    before = parts[1].report()
    merged = parts[0].merge(parts[1])
    assert merged is parts[0]
    merged.merge(parts[2])
    assert_same_report(merged.report(), whole.report())
    assert_same_report(merged.report(by="module"), whole.report(by="module"))
    assert_same_report(parts[1].report(), before)
    pd.testing.assert_frame_equal(merged.per_sample, whole.per_sample, rtol=1e-12)
    for name, diagonal in whole.diagonal.items():
        assert_equal(merged.diagonal[name], diagonal, whole.trace)


def test_merging_with_an_empty_monitor_changes_nothing() -> None:
    model, data = classifier(), batch()
    with FisherMonitor(model) as monitor:
        backward(model, *data)
    before = monitor.report()
    assert_same_report(monitor.merge(FisherMonitor(model)).report(), before)
    assert_same_report(FisherMonitor(model).merge(monitor).report(), before)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: FisherMonitor(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()),
            r"2\.weight|shape",
        ),
        (lambda: FisherMonitor(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()), r"[12]\.(weight|bias)"),
        (lambda: FisherMonitor(classifier(), reduction="sum"), r"reduction"),
    ],
    ids=["shapes", "names", "reduction"],
)
@pytest.mark.parametrize("how", ["merge", "load_state_dict"])
def test_merging_or_loading_what_does_not_fit_raises(
    other: Callable[[], FisherMonitor], message: str, how: str
) -> None:
    model, data = classifier(), batch()
    with FisherMonitor(model) as monitor:
        backward(model, *data)
    before, stranger = monitor.report(), other()
    with pytest.raises(CurvatureError, match=message):
        monitor.merge(stranger) if how == "merge" else monitor.load_state_dict(stranger.state_dict())
    assert_same_report(monitor.report(), before)


@pytest.mark.parametrize("kind", ["diagonal", "per_sample"])
def test_merging_one_kind_with_another_raises_or_keeps_what_both_have(kind: str) -> None:
    model, data = classifier(), batch()
    monitors = []
    for options in ({kind: True}, {}):
        with FisherMonitor(model, **options) as monitor:
            backward(model, *data)
        monitors.append(monitor)
    with pytest.raises(CurvatureError, match=kind):
        monitors[0].merge(monitors[1])


def test_a_round_trip_through_the_state_dict() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    options = {"diagonal": True, "per_sample": True}
    with FisherMonitor(model, **options) as monitor:
        backward(model, *first)
    buffer = io.BytesIO()
    torch.save(monitor.state_dict(), buffer)
    buffer.seek(0)
    restored = FisherMonitor(model, **options)
    restored.load_state_dict(torch.load(buffer))
    assert_same_report(restored.report(), monitor.report())
    assert_same_report(restored.report(by="type"), monitor.report(by="type"))
    for m in (monitor, restored):
        with m:
            backward(model, *second)
    assert_report(restored, norms(model, first, second))
    assert_same_report(restored.report(by="module"), monitor.report(by="module"))
    pd.testing.assert_frame_equal(restored.per_sample, monitor.per_sample)
    assert all(torch.equal(restored.diagonal[name], d) for name, d in monitor.diagonal.items())


def test_a_state_dict_does_not_change_any_more() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    with FisherMonitor(model, diagonal=True) as monitor:
        backward(model, *first)
        saved, before = monitor.state_dict(), monitor.report()
        backward(model, *second)
    other = FisherMonitor(model, diagonal=True)
    other.load_state_dict(saved)
    assert_same_report(other.report(), before)
    with other:
        backward(model, *second)
    again = FisherMonitor(model, diagonal=True)
    again.load_state_dict(saved)
    assert_same_report(again.report(), before)


# Nothing is left behind


def test_an_exception_inside_leaves_nothing_and_loses_nothing() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    before, monitor = state(model), FisherMonitor(model)
    with pytest.raises(RuntimeError, match="mine"), monitor:
        assert any(hooks(model).values())
        backward(model, *first)
        cross_entropy()(model(second[0]), second[1])
        raise RuntimeError("mine")
    model.zero_grad()
    assert_unchanged(before, model)
    assert_report(monitor, norms(model, first))
    with monitor:
        backward(model, *second)
    assert_report(monitor, norms(model, first, second))


def test_an_exception_inside_forward_or_backward_leaves_nothing() -> None:
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError("broken backward")

    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.when = nn.Linear(4, 4), nn.Linear(4, 3), ""

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x)
            if self.when == "forward":
                raise RuntimeError("broken forward")
            return self.two(Breaks.apply(h) if self.when == "backward" else h.tanh())

    model, data = Fragile().double(), batch()
    monitor = FisherMonitor(model)
    for model.when in ("forward", "backward"):
        with pytest.raises(RuntimeError, match=f"broken {model.when}"), monitor:
            backward(model, *data)
        assert not any(hooks(model).values())
    model.when = ""
    with monitor:
        for model.when in ("forward", "backward", ""):
            if model.when:
                with pytest.raises(RuntimeError, match=f"broken {model.when}"):
                    backward(model, *data)
            else:
                backward(model, *data)
    assert_report(monitor, norms(model, data))


def test_leaving_a_loop_in_the_middle_leaves_nothing() -> None:
    model, data = classifier(), batch()
    for _ in range(2):
        with FisherMonitor(model) as monitor:
            backward(model, *data)
            model(data[0])
            break
    assert not any(hooks(model).values())
    assert_report(monitor, norms(model, data))


def test_a_backward_after_the_block_is_as_if_there_had_been_none() -> None:
    model, (x, y) = classifier(), batch()
    with FisherMonitor(model) as monitor:
        loss = cross_entropy()(model(x), y)
    loss.backward()
    mine = gradients(model)
    model.zero_grad()
    backward(model, x, y)
    assert_same_gradients(mine, gradients(model))
    assert monitor.n_samples == 0


def test_nothing_is_written_on_the_model() -> None:
    model, data = classifier(), batch()
    before = state(model)
    with FisherMonitor(model, diagonal=True, per_sample=True, activations=True) as monitor:
        backward(model, *data)
        model.zero_grad()
        inside = state(model)
        assert inside["attributes"] == before["attributes"]
        assert inside["parameter_attributes"] == before["parameter_attributes"]
    monitor.report()
    assert_unchanged(before, model)


def test_the_users_own_hooks_stay() -> None:
    model, data, calls = classifier(), batch(), []
    model[0].register_forward_hook(lambda module, args, output: calls.append("forward"))
    model[2].register_forward_hook(lambda module, args, output: output * 2)
    before = state(model)
    with FisherMonitor(model) as monitor:
        backward(model, *data)
    model.zero_grad()
    assert_unchanged(before, model)
    assert calls == ["forward"]
    assert_report(monitor, norms(model, data))


@pytest.mark.parametrize("where", ["inside", "after"])
def test_the_monitor_keeps_no_forward_alive(where: str) -> None:
    """A forward that no backward follows is gone with its outputs, at once for all of its layers."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])
    seen: list[weakref.ref[Tensor]] = []

    def dead() -> bool:
        gc.collect()
        return all(tensor() is None for tensor in seen)

    for layer in model:
        layer.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(args[0])))
    with FisherMonitor(model) as monitor:
        model(torch.randn(5, 4)).sum().backward()
        for _ in range(3):
            model(torch.randn(5, 4))
        if where == "inside":
            assert dead()
    assert dead()
    assert len(seen) == 24
    assert monitor.n_samples == 5


def test_a_copy_made_inside_the_block_is_nobodys() -> None:
    model, data = classifier(), batch()
    with FisherMonitor(model) as monitor:
        backward(model, *data)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            backward(twin, *data)
    backward(twin, *data)
    assert_report(monitor, norms(model, data))
    assert not any(hooks(copy.deepcopy(model)).values())


# Calls that leave open what a sample is


def test_two_backwards_through_one_forward_raise() -> None:
    model, (x, y), other = classifier(), batch(), batch(3)
    with FisherMonitor(model) as monitor:
        backward(model, *other)
        loss = cross_entropy()(model(x), y)
        loss.backward(retain_graph=True)
        model.zero_grad()
        with pytest.raises(CurvatureError, match=r"(?i)repeated_calls|twice|two backward|second backward|again"):
            loss.backward()
        mine = gradients(model)
        model.zero_grad()
        with pytest.raises(CurvatureError, match=r"(?i)empty|sample"):
            model(x[:0])
    backward(model, x, y)
    assert_same_gradients(mine, gradients(model))
    assert monitor.n_samples in (3, 8)
    assert not any(hooks(model).values())


def siamese(model: nn.Module, pair: Tensor) -> Tensor:
    return model(pair[:, 0]) - model(pair[:, 1])


class Siamese(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, pair: Tensor) -> Tensor:
        return siamese(self.body, pair)


def test_two_calls_of_the_model_reached_by_one_backward_raise() -> None:
    model, (x, y), other = classifier(), batch(), batch(3)
    pair = torch.stack([x, x.flip(0)], 1)
    with FisherMonitor(model) as monitor:
        backward(model, *other)
        model.zero_grad()
        loss = cross_entropy()(siamese(model, pair), y)
        with pytest.raises(CurvatureError, match=r"repeated_calls"):
            loss.backward()
        mine = gradients(model)
    model.zero_grad()
    cross_entropy()(siamese(model, pair), y).backward()
    assert_same_gradients(mine, gradients(model))
    assert_report(monitor, norms(model, other))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_repeated_calls_of_the_same_samples(reduction: str) -> None:
    model, (x, y) = classifier(), batch()
    pair = torch.stack([x, torch.randn_like(x)], 1)
    loss_fn = cross_entropy(reduction)
    with FisherMonitor(model, reduction=reduction, repeated_calls="same") as monitor:
        loss_fn(siamese(model, pair), y).backward()
    squared = per_sample_squared_norms(Siamese(model), loss_fn, pair, y)
    assert_report(monitor, {name.removeprefix("body."): t for name, t in squared.items()}, reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_repeated_calls_of_new_samples(reduction: str) -> None:
    """The loss is the mean, or the sum, over the samples of all the calls that the backward pass reaches."""
    model, first, second = classifier(), batch(5), batch(3)
    with FisherMonitor(model, reduction=reduction, repeated_calls="new") as monitor:
        loss = sum(cross_entropy("sum")(model(x), y) for x, y in (first, second))
        (loss / 8 if reduction == "mean" else loss).backward()
    assert_report(monitor, norms(model, first, second), reduction)


def test_repeated_calls_of_the_same_samples_must_be_as_many() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    with FisherMonitor(model, repeated_calls="same"), pytest.raises(CurvatureError, match=r"(?s)5.*3|3.*5"):
        sum(cross_entropy()(model(x), y) for x, y in (first, second)).backward()


# Gradients that are not finite


everything = pytest.mark.parametrize(
    "options", [{}, {"diagonal": True, "per_sample": True}], ids=["plain", "everything"]
)


@everything
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_parameters_and_loses_nothing(
    value: float, options: dict[str, Any]
) -> None:
    model, first, second = classifier(), batch(5), batch(3)
    with FisherMonitor(model, **options) as monitor:
        backward(model, *first)
        before = monitor.report()
        model.zero_grad()
        with pytest.raises(CurvatureError, match=r"(?s)0\.weight.*nonfinite|nonfinite.*0\.weight"):
            (cross_entropy()(model(second[0]), second[1]) * value).backward()
        assert all(p.grad is not None for p in model.parameters())
        assert_same_report(monitor.report(), before)
        backward(model, *second)
    assert_report(monitor, norms(model, first, second))
    if options:
        assert len(monitor.per_sample) == 8
        assert all(torch.isfinite(d).all() for d in monitor.diagonal.values())


def test_only_the_parameters_that_are_not_finite_are_named() -> None:
    """An infinite input saturates tanh: the first weight's gradient is 0 * inf, all others are finite."""
    model, (x, y) = classifier(), batch()
    x[0, 0] = math.inf
    with FisherMonitor(model), pytest.raises(CurvatureError, match=r"0\.weight") as raised:
        backward(model, x, y)
    assert not any(name in str(raised.value) for name in ("0.bias", "2.weight", "2.bias"))


@everything
def test_batches_that_are_not_finite_may_be_skipped(options: dict[str, Any]) -> None:
    model, first, second = classifier(), batch(5), batch(3)
    with FisherMonitor(model, nonfinite="skip", **options) as monitor:
        backward(model, *first)
        (cross_entropy()(model(second[0]), second[1]) * math.nan).backward()
        backward(model, *second)
    assert_report(monitor, norms(model, first, second))
    if options:
        assert len(monitor.per_sample) == 8
        diagonals = torch.stack([d.sum() for d in monitor.diagonal.values()])
        assert_equal(diagonals.sum(), monitor.trace, monitor.trace, torch.float64)
    assert monitor.report()["grad_sq_norm"].notna().all()


@everything
def test_only_the_samples_that_are_not_finite_are_skipped(options: dict[str, Any]) -> None:
    model, (x, y) = classifier(), batch(5)
    kept = torch.tensor([0, 1, 3, 4])
    expected = norms(model, (x[kept], y[kept]))
    x[2, 0] = math.nan
    with FisherMonitor(model, nonfinite="skip", **options) as monitor:
        backward(model, x, y)
    assert_report(monitor, expected)
    if options:
        for name, t in expected.items():
            assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()), t, monitor.trace)
            assert_equal(monitor.diagonal[name].sum(), t.mean(), monitor.trace)


# Standard errors


def stderr(t: np.ndarray, reduction: str) -> float:
    n = len(t)
    return float(np.std(t, ddof=1) / math.sqrt(n) * (n if reduction == "sum" else 1))


GROUPINGS: dict[str, Any] = {
    "module": lambda name: name.rpartition(".")[0],
    "type": lambda name: "Linear",
    "callable": lambda name: "weights" if name.endswith("weight") else "biases",
    "total": lambda name: "everything",
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_standard_errors_of_parameters(reduction: str) -> None:
    model, batches = classifier(), [batch(5), batch(3), batch(4)]
    with FisherMonitor(model, reduction=reduction) as monitor:
        for x, y in batches:
            backward(model, x, y, reduction)
    report = monitor.report()
    for name, t in norms(model, *batches).items():
        expected = stderr(t.numpy(), reduction)
        assert report.loc[name, "fisher_trace_stderr"] == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_standard_errors_of_groups(grouping: str, reduction: str) -> None:
    model, batches = classifier(), [batch(5), batch(3), batch(4)]
    with FisherMonitor(model, reduction=reduction) as monitor:
        for x, y in batches:
            backward(model, x, y, reduction)
    group_of = GROUPINGS[grouping]
    report = monitor.report(by=grouping if grouping in ("module", "type") else group_of)
    sums: dict[str, np.ndarray] = {}
    for name, t in norms(model, *batches).items():
        sums[group_of(name)] = sums.get(group_of(name), 0) + t.numpy()
    assert list(report.index) == list(sums)
    for group, t in sums.items():
        assert report.loc[group, "fisher_trace_stderr"] == pytest.approx(stderr(t, reduction), rel=1e-8)


def test_one_sample_has_no_standard_error() -> None:
    model = classifier()
    with FisherMonitor(model) as monitor:
        backward(model, *batch(1))
    assert monitor.report()["fisher_trace_stderr"].isna().all()
    assert monitor.report(by="module")["fisher_trace_stderr"].isna().all()
    assert monitor.report()["fisher_trace"].notna().all()


def test_equal_samples_have_a_standard_error_of_zero() -> None:
    model, (x, y) = classifier(), batch(1)
    with FisherMonitor(model) as monitor:
        backward(model, x.repeat(6, 1), y.repeat(6))
    report = monitor.report()
    assert (report["fisher_trace_stderr"] >= 0).all()
    assert (report["fisher_trace_stderr"] <= 1e-7 * report["fisher_trace"]).all()


# grad_sq_norm


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_grad_sq_norm_is_the_mean_over_passes(reduction: str) -> None:
    model, batches = classifier(), [batch(5), batch(3)]
    expected: dict[str, list[float]] = {name: [] for name, _ in model.named_parameters()}
    for x, y in batches:
        model.zero_grad()
        backward(model, x, y, reduction)
        for name, p in model.named_parameters():
            expected[name].append(float(p.grad.square().sum()))
    model.zero_grad()
    with FisherMonitor(model, reduction=reduction) as monitor:
        for x, y in batches:  # accumulating: the norm is that of what each pass adds
            backward(model, x, y, reduction)
    for name, values in expected.items():
        assert monitor.report().loc[name, "grad_sq_norm"] == pytest.approx(np.mean(values), rel=1e-8)
    by_module = monitor.report(by="module")
    assert by_module.loc["0", "grad_sq_norm"] == pytest.approx(
        np.mean(expected["0.weight"]) + np.mean(expected["0.bias"])
    )


def test_grad_sq_norm_of_a_frozen_parameter_is_nan() -> None:
    model, data = classifier(), batch()
    model[0].requires_grad_(False)
    with FisherMonitor(model, parameters="all") as monitor:
        backward(model, *data)
    missing = monitor.report()["grad_sq_norm"].isna()
    assert dict(missing) == {"0.weight": True, "0.bias": True, "2.weight": False, "2.bias": False}
    assert monitor.report()["fisher_trace"].gt(0).all()


def test_a_parameter_that_no_backward_reached_is_unused() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, data = Spare().double(), batch()
    with FisherMonitor(model) as monitor:
        backward(model, *data)
    report = monitor.report()
    assert list(report["rule"] == "unused") == [False, False, True, True]
    assert list(report.loc[["spare.weight", "spare.bias"], "fisher_trace"]) == [0, 0]
    assert list(report.loc[["spare.weight", "spare.bias"], "fisher_trace_share"]) == [0, 0]


# Diagonal, per sample, activations


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_diagonal_sums_to_the_trace(reduction: str) -> None:
    model, batches = classifier(), [batch(5), batch(3)]
    with FisherMonitor(model, reduction=reduction, diagonal=True) as monitor:
        for x, y in batches:
            backward(model, x, y, reduction)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    squares = {n: g.square() for n, g in per_sample_gradients(model, cross_entropy(), x, y).items()}
    for name, p in model.named_parameters():
        expected = squares[name].mean(0) if reduction == "mean" else squares[name].sum(0)
        assert monitor.diagonal[name].shape == p.shape
        assert_equal(monitor.diagonal[name], expected, monitor.trace)
        assert float(monitor.diagonal[name].sum()) == pytest.approx(
            monitor.report().loc[name, "fisher_trace"], rel=1e-8
        )


def test_per_sample_has_a_row_per_sample_in_backward_order() -> None:
    model, batches = classifier(), [batch(5), batch(3)]
    with FisherMonitor(model, reduction="sum", per_sample=True) as monitor:
        for x, y in batches:
            backward(model, x, y, "sum")
    table, squared = monitor.per_sample, norms(model, *batches)
    assert isinstance(table, pd.DataFrame)
    assert list(table.columns) == list(squared)
    assert len(table) == 8
    for name, t in squared.items():
        assert_equal(torch.tensor(table[name].to_numpy()), t, monitor.trace)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_activation_traces(reduction: str) -> None:
    model, (x, y) = classifier(), batch()
    with FisherMonitor(model, reduction=reduction, activations=True) as monitor:
        backward(model, x, y, reduction)
    table = monitor.activations
    assert list(table.columns[:2]) == ["module_type", "activation_trace"]
    for name in ("0", "2"):
        t = activation_squared_norms(model, name, cross_entropy(), x, y)
        expected = t.mean() if reduction == "mean" else t.sum()
        assert table.loc[name, "activation_trace"] == pytest.approx(float(expected), rel=1e-8)
        assert table.loc[name, "module_type"] == "Linear"


def test_activations_have_a_row_per_module_and_pooled_moments() -> None:
    model, batches = classifier(), [batch(5), batch(3)]
    with FisherMonitor(model, activations=True) as monitor:
        for x, y in batches:
            backward(model, x, y)
    table = monitor.activations
    assert set(table.index) == {"", "0", "1", "2"}
    assert table.index.name == "module"
    outputs = model[0](torch.cat([x for x, _ in batches])).detach()
    row = table.loc["0"]
    assert row["mean"] == pytest.approx(float(outputs.mean()), rel=1e-9)
    assert row["std"] == pytest.approx(float(outputs.std(correction=0)), rel=1e-9)
    assert (row["min"], row["max"]) == (float(outputs.min()), float(outputs.max()))
    squared = [len(x) * activation_squared_norms(model, "1", cross_entropy(), x, y).mean() for x, y in batches]
    assert table.loc["1", "activation_trace"] == pytest.approx(float(sum(squared)) / 8, rel=1e-9)


def test_activations_merge_and_reset() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    monitors = []
    for batches in ([first], [second], [first, second]):
        with FisherMonitor(model, activations=True) as monitor:
            for x, y in batches:
                backward(model, x, y)
        monitors.append(monitor)
    pd.testing.assert_frame_equal(monitors[0].merge(monitors[1]).activations, monitors[2].activations, rtol=1e-12)
    other = FisherMonitor(model, activations=True)
    other.load_state_dict(monitors[2].state_dict())
    pd.testing.assert_frame_equal(other.activations, monitors[2].activations)
    monitors[2].reset()
    with pytest.raises(CurvatureError, match=r"(?i)no sample"):
        _ = monitors[2].activations


# Precision and places


def test_squared_norms_of_half_precision_models_do_not_overflow() -> None:
    torch.manual_seed(1)
    model = nn.Linear(4, 3).bfloat16()
    x, y = torch.randn(5, 4).bfloat16(), torch.randn(5, 3).bfloat16()
    with FisherMonitor(model) as monitor:
        nn.MSELoss()(model(x), y).backward()
    expected = trace(per_sample_squared_norms(model, nn.MSELoss(), x, y))
    assert monitor.trace.dtype in (torch.float32, torch.float64)
    assert float(monitor.trace) == pytest.approx(float(total(expected)), rel=0.05)


def test_autocast_is_seen_as_the_operations_saw_it() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(5, 7, 16), torch.randn(5, 7, 3)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nn.MSELoss()(model(inputs).float(), targets)

    expected = {name: 0.0 for name, _ in model.named_parameters()}
    for n in range(5):
        model.zero_grad()
        loss(x[n : n + 1], y[n : n + 1]).backward()
        for name, p in model.named_parameters():
            expected[name] += float(p.grad.square().sum()) / 5
    with FisherMonitor(model) as monitor:
        loss(x, y).backward()
    for name, value in expected.items():
        assert monitor.report().loc[name, "fisher_trace"] == pytest.approx(value, rel=0.02), name
    assert monitor.trace.dtype in (torch.float32, torch.float64)


def test_a_layers_input_changed_in_place_before_the_backward_is_refused() -> None:
    """A frozen layer's input isn't guarded by autograd, which has no need of it."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
            self.overwrite = False

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            h = self.frozen(x)
            if self.overwrite:
                x.mul_(0.5)
            return self.last(h.tanh())

    model, data = Overwrites().double(), batch()
    expected = per_sample_squared_norms(model, cross_entropy(), *data)
    model.frozen.requires_grad_(False)
    with FisherMonitor(model, parameters="all") as monitor:
        model.overwrite = True
        with pytest.raises(CurvatureError, match=r"Linear 'frozen': its input was changed in place.*out of place"):
            backward(model, *data)
        model.overwrite = False
        backward(model, *data)
    assert_report(monitor, expected)


def test_gradients_too_large_to_square_in_float32_are_refused() -> None:
    """A norm of 1e25 has a square beyond the largest number of float32."""
    model, (x, y) = classifier().float(), batch()
    with FisherMonitor(model) as monitor:
        with pytest.raises(
            NonFiniteError, match=r"samples 0, 1, 2, 3, 4 are not finite, in parameters 0\.weight, .*nonfinite="
        ):
            (cross_entropy()(model(x.float()), y) * 1e25).backward()
        backward(model, x.float(), y)
    expected = total(trace(norms(model, (x, y))))
    assert float(monitor.trace) == pytest.approx(float(expected), rel=1e-4)


def test_the_trace_is_a_scalar_tensor_without_a_graph() -> None:
    model = classifier()
    with FisherMonitor(model) as monitor:
        backward(model, *batch())
    assert monitor.trace.shape == ()
    assert not monitor.trace.requires_grad
    assert monitor.trace.dtype == torch.float64


def test_squared_norms_are_never_negative() -> None:
    """Gradients that cancel over positions: the Gram form subtracts large numbers there."""
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    x = torch.randn(4, 1, 16).repeat(1, 2, 1) * 1e3
    sign = torch.tensor([1.0, -1.0])[:, None]
    with FisherMonitor(model) as monitor:
        (model(x) * sign).sum((1, 2)).mean().backward()
    report = monitor.report()
    assert (report["fisher_trace"] >= 0).all()
    assert report.loc["weight", "fisher_trace"] < 1e-6 * float(x.square().sum())


def test_squared_norms_that_nearly_cancel_stay_accurate_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Linear(24, 20)
    x = torch.randn(4, 1, 24).repeat(1, 2, 1)
    x[:, 1] += 1e-2 * torch.randn(4, 24)
    y = torch.randn(4, 1, 20)
    weight = torch.stack([torch.ones(20), -torch.ones(20)])

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * targets * weight.to(outputs)).sum((1, 2)).mean()

    expected = trace(squared_norms(per_sample_gradients(model, loss, x, y)))
    with FisherMonitor(model) as monitor:
        loss(model(x), y).backward()
    assert_equal(torch.tensor(monitor.report().loc["weight", "fisher_trace"]), expected["weight"], 0, torch.float32)


def test_norms_of_whole_gradients_from_their_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of .grad, in passes that check it and in those that do not."""
    model = nn.Sequential(nn.Linear(1200, 1300), nn.Tanh(), nn.Linear(1300, 1200)).double()
    found: list[Tensor | None] = []
    batch_gradient_norm = Outer.batch_gradient_norm

    def counted(form: Outer) -> Tensor | None:
        found.append(batch_gradient_norm(form))
        return found[-1]

    monkeypatch.setattr(Outer, "batch_gradient_norm", counted)
    squares = {name: 0.0 for name, _ in model.named_parameters()}
    with FisherMonitor(model) as monitor:
        for _ in range(8):
            model.zero_grad()
            x, y = torch.randn(2, 32, 1200, dtype=torch.float64)
            nn.functional.mse_loss(model(x), y).backward()
            for name, p in model.named_parameters():
                assert p.grad is not None
                squares[name] += float(p.grad.square().sum()) / 8
    assert len(found) > 2
    assert all(norm is not None for norm in found)
    for name, value in monitor.report()["grad_sq_norm"].items():
        assert value == pytest.approx(squares[str(name)], rel=1e-9)


def test_norms_of_whole_gradients_are_of_what_a_hook_makes_of_them() -> None:
    """In every pass, and not only in those that read the gradient anyway."""
    model, squares = nn.Linear(1200, 1300).double(), 0.0
    model.weight.register_hook(lambda grad: grad / 2)
    with FisherMonitor(model) as monitor:
        for _ in range(6):
            model.zero_grad()
            nn.functional.mse_loss(model(torch.randn(32, 1200).double()), torch.zeros(32, 1300).double()).backward()
            assert model.weight.grad is not None
            squares += float(model.weight.grad.square().sum()) / 6
    assert monitor.report().loc["weight", "grad_sq_norm"] == pytest.approx(squares, rel=1e-9)


class Projections(nn.Module):
    """Several layers that get the same tensor, as queries, keys and values do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 256), nn.Linear(256, 3)
        self.query, self.key, self.value = (nn.Linear(256, width) for width in (256, 256, 192))
        self.gate = nn.Linear(256, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        scores = self.query(h) @ self.key(input=h).mT
        mixed = (scores.softmax(-1) @ torch.cat([self.value(h), self.value(h.clone())[..., :64]], -1)).tanh()
        return self.last(mixed * self.gate(h)).mean(1)


@pytest.mark.parametrize("positions", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_with_the_same_input_share_its_gram_matrix(
    positions: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Projections().to(dtype)
    x, y = torch.randn(6, positions, 6, dtype=dtype), torch.randint(3, (6,))
    products, strip = [], outer._strip

    def counted(value: Tensor, *where: Any) -> Tensor:
        products.append(value.shape[-1])
        return strip(value, *where)

    monkeypatch.setattr(outer, "_strip", counted)
    with FisherMonitor(model) as monitor:
        for _ in range(4):  # of which the last is not checked
            products.clear()
            nn.functional.cross_entropy(model(x), y).backward()
    expected = trace(per_sample_squared_norms(model, nn.CrossEntropyLoss(), x, y))
    found = monitor.report()["fisher_trace"]
    for name, value in expected.items():
        assert_equal(found[name], value, total(expected), dtype=dtype)
    if positions == 40:
        # Of inputs two strips for the query and the gate together, two for the key, three for the value's two calls; of
        # gradients two for each of the query, the key and the gate.
        assert products.count(256) == 7 + 6
