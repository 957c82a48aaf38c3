"""What a monitor counts as a sample, what accumulates, and what loss_scale undoes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monitor.classifier import (
    FIGURES,
    REDUCTIONS,
    assert_report,
    backward,
    batch,
    classifier,
    cross_entropy,
    norms,
)
from oracles import (
    assert_equal,
    per_sample_squared_norms,
    trace,
)
from torch_secorder import FisherMonitor
from torch_secorder.errors import CurvatureError

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
def test_cross_entropy_with_another_normalizer(options: dict[str, Any], reduction: str) -> None:
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


def test_no_parameter_gradient_to_square() -> None:
    model, (x, y) = classifier().requires_grad_(False), batch()
    with FisherMonitor(model, parameters="all") as monitor:
        cross_entropy()(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())
    assert_report(monitor, norms(model.requires_grad_(), (x, y)))
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


def test_accumulated_batches_are_passes_of_their_own() -> None:
    model = classifier()
    with FisherMonitor(model, loss_scale=0.5) as monitor:
        for _ in range(6):
            backward(model, *batch(4), scale=0.5)
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
    modules = {"inner": 0, **dict.fromkeys(["embedding", "norm", "b*", "head"], 1)}
    axes = {"inputs": 1, "outputs": {0: 1}, "modules": modules}
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
        ({"3": 1}, r"batch_axis.*'modules'"),
        ({"modules": {"0": 0, "9*": 1}}, r"modules that the model lacks: 9\*"),
        ({"modules": {"0": -1}}, r"batch_axis\['modules'\].*-1"),
        ({"outputs": True}, r"batch_axis\['outputs'\].*True"),
        ({"inputs": {0: "rows"}}, r"batch_axis\['inputs'\].*rows"),
        ({"inputs": {"mask": 0}}, r"lacks: mask"),
        ("0", r"batch_axis"),
        (True, r"batch_axis"),
        ([], r"batch_axis"),
        (-2, r"batch_axis.*-2"),
        ({"targets": -1}, r"batch_axis\['targets'\].*-1"),
    ],
    ids=str,
)
def test_a_batch_axis_that_means_nothing(batch_axis: Any, message: str) -> None:
    with pytest.raises(CurvatureError, match=message) as raised:
        FisherMonitor(classifier(), batch_axis=batch_axis)
    assert isinstance(raised.value, ValueError)
