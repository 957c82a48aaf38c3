"""Refused passes that are skipped, scales that a function tells, and gradients that are more than the sum over samples."""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model_state import assert_same_gradients, gradients, hooks
from monitor.classifier import assert_report, backward, batch, classifier, cross_entropy, norms
from ranks import on_ranks
from torch_secorder import FisherMonitor
from torch_secorder.errors import ArgumentError, CurvatureError, LifecycleError, ShapeError, SkippedPassWarning

# on_refusal="skip"


def twice(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Two passes through one forward, of which the second is refused."""
    loss = cross_entropy()(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()


def not_finite(model: nn.Module, x: Tensor, y: Tensor) -> None:
    (cross_entropy()(model(x), y) * torch.inf).backward()


def two_calls(model: nn.Module, x: Tensor, y: Tensor) -> None:
    cross_entropy()(model(x) - model(x.flip(0)), y).backward()


@pytest.mark.parametrize("step", [twice, not_finite, two_calls])
def test_a_refused_pass_is_skipped_and_counted(step: object) -> None:
    model, first, second = classifier(), batch(5), batch(3)
    twin, counted = copy.deepcopy(model), 2 if step is twice else 1
    step(twin, *second)
    with FisherMonitor(model, on_refusal="skip") as monitor:
        backward(model, *first)
        model.zero_grad()
        with pytest.warns(SkippedPassWarning, match="left out"):
            step(model, *second)
        mine = gradients(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of each kind of error only the first is told
            step(model, *second)
    assert_same_gradients(mine, gradients(twin))
    attrs = monitor.report().attrs
    assert (attrs["skipped_passes"], attrs["n_passes"]) == (2, 2 * counted - 1)
    assert_report(monitor, norms(model, first, *[second] * (2 * (counted - 1))))
    assert not any(hooks(model).values())


def test_each_kind_of_error_is_told_once() -> None:
    model, data = classifier(), batch()
    with FisherMonitor(model, on_refusal="skip") as monitor, pytest.warns(SkippedPassWarning) as told:
        for step in (not_finite, two_calls) * 3:
            step(model, *data)
    assert [str(one.message).split(":")[0] for one in told] == [
        "a backward pass was left out (NonFiniteError)",
        "a backward pass was left out (LifecycleError)",
    ]
    with pytest.raises(
        LifecycleError, match=r"no sample was seen yet: 6 backward passes were refused, the last because: "
    ):
        monitor.report()


def here() -> int:
    """The line of the caller."""
    return inspect.stack()[1].lineno


def test_a_warning_names_the_users_line() -> None:
    model, (x, y) = classifier(), batch()
    loss = lambda: cross_entropy()(model(x), y) * torch.inf  # noqa: E731  # a pass that is refused
    with FisherMonitor(model, on_refusal="skip"), pytest.warns(SkippedPassWarning) as told:
        line, _ = here(), loss().backward()
    with FisherMonitor(model, on_refusal="skip"), pytest.warns(SkippedPassWarning) as told_of_a_call:
        line_of_a_call, _ = here(), torch.autograd.grad(loss(), list(model.parameters()))
    found = [(one.filename, one.lineno) for one in (*told, *told_of_a_call)]
    assert found == [(__file__, line), (__file__, line_of_a_call)]


def test_what_is_said_when_the_block_ends_names_the_blocks_line() -> None:
    model, (x, _) = classifier(), batch()
    with pytest.warns(SkippedPassWarning) as told:
        line = here() + 1
        with FisherMonitor(model, on_refusal="skip"):
            outputs = model(x)
            torch.autograd.grad(
                outputs, list(model.parameters()), torch.ones(2, *outputs.shape).double(), is_grads_batched=True
            )
    assert [(one.filename, one.lineno) for one in told] == [(__file__, line)]


@pytest.mark.parametrize("first", [0, 5])  # the sixth pass of a kind is not one whose sums are checked
def test_a_weight_penalty_is_found_in_every_pass(first: int) -> None:
    """As elastic weight consolidation adds it."""
    model, data = classifier(), [batch() for _ in range(14)]
    before = [p.detach() + 0.1 for p in model.parameters()]
    fisher = [torch.rand_like(p) for p in model.parameters()]
    skipped = []
    with FisherMonitor(model, on_refusal="skip") as monitor, pytest.warns(SkippedPassWarning, match="a weight penalty"):
        for number, (x, y) in enumerate(data):
            of_weights = zip(fisher, model.parameters(), before, strict=True)
            penalty = sum((f * (p - p0) ** 2).sum() for f, p, p0 in of_weights)
            (cross_entropy()(model(x), y) + (penalty if number >= first else 0)).backward()
            skipped.append(monitor.results.statistics.skipped_passes)
    assert skipped[first:] == list(range(1, len(data) - first + 1))
    if first:
        assert_report(monitor, norms(model, *data[:first]))
    else:
        assert monitor.n_samples == 0


def skipping(*steps: object) -> FisherMonitor:
    torch.manual_seed(0)
    model, data = classifier(), batch()
    with FisherMonitor(model, on_refusal="skip") as monitor, warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedPassWarning)
        for step in steps:
            step(model, *data)
    return monitor


def test_skipped_passes_merge_and_are_saved(tmp_path: Path) -> None:
    one, two = skipping(backward, not_finite), skipping(not_finite, two_calls)
    assert one.merge(two).report().attrs["skipped_passes"] == 3
    one.save(tmp_path / "one.safetensors")
    assert FisherMonitor.load(tmp_path / "one.safetensors").report().attrs["skipped_passes"] == 3
    three = FisherMonitor(classifier())
    three.load_state_dict(one.state_dict())
    assert three.report().attrs["skipped_passes"] == 3
    three.reset()
    assert three.state_dict()["skipped_passes"] == 0


def test_without_refusals_nothing_is_skipped() -> None:
    assert skipping(backward).report().attrs["skipped_passes"] == 0


def test_what_is_wrong_on_entry_in_forward_or_with_an_argument_is_raised_nevertheless() -> None:
    model, (x, y) = classifier(), batch()
    with FisherMonitor(model, on_refusal="skip") as monitor, pytest.raises(LifecycleError, match="active already"):
        monitor.__enter__()
    with FisherMonitor(model, on_refusal="skip", batch_axis=1) as other, pytest.raises(ShapeError, match="axis 1"):
        model(x)
    assert other.results.statistics.skipped_passes == 0
    scaled = FisherMonitor(model, on_refusal="skip", loss_scale=lambda: -1.0)
    with scaled, pytest.raises(ArgumentError, match="loss_scale"):
        backward(model, x, y)
    assert scaled.results.statistics.skipped_passes == 0
    with pytest.raises(ArgumentError, match=r"on_refusal must be one of 'raise', 'skip', not 'ignore'"):
        FisherMonitor(model, on_refusal="ignore")


# loss_scale


def test_a_function_is_asked_for_the_scale_once_a_pass_also_of_refused_ones() -> None:
    model, data = classifier(), [batch() for _ in range(4)]
    scales = itertools.count(1)
    with FisherMonitor(model, loss_scale=lambda: 2.0 ** next(scales)) as monitor:
        backward(model, *data[0], scale=2.0)
        with pytest.raises(CurvatureError, match="not finite"):
            backward(model, *data[1], scale=torch.inf)
        model(data[1][0])  # a forward without a backward pass
        x = data[1][0].clone().requires_grad_()
        torch.autograd.grad(model(x).sum(), x)  # which has no samples
        backward(model, *data[2], scale=8.0)
        backward(model, *data[3], scale=16.0)
    assert_report(monitor, norms(model, data[0], data[2], data[3]))


# grad_sq_norm


class Wide(nn.Module):
    """Layers whose factors tell the norm of their weight's gradient for less than reading it costs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1024, 1024), nn.Linear(1024, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


def wide(*shape: int) -> tuple[nn.Module, Tensor, Tensor]:
    return Wide().double(), torch.randn(*shape, 1024, dtype=torch.float64), torch.randint(3, shape)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).movedim(-1, 1), y)


PENALTIES = {
    "of all entries": lambda w: w.square().sum(),
    "of one entry": lambda w: w[3, 5].square(),
    "a sum": lambda w: w.sum(),
    "twice": lambda w: w.sum() + w.square().sum(),
}


@pytest.mark.parametrize("shape", [(40,), (4, 10)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_gradients_norm_has_what_a_penalty_adds_in_a_pass_that_is_not_checked(
    penalty: str, shape: tuple[int, ...]
) -> None:
    model, x, y = wide(*shape)
    expected = []
    with FisherMonitor(model) as monitor:
        for number in range(1, 5):  # the fourth pass is not checked, and in the others the penalty adds nothing
            model.zero_grad()
            loss = loss_of(model, x, y)
            (loss + float(number == 4) * PENALTIES[penalty](model.first.weight)).backward()
            expected.append(float(model.first.weight.grad.square().sum()))
    assert monitor.report().grad_sq_norm["first.weight"] == pytest.approx(sum(expected) / 4, rel=1e-9)


def test_the_gradients_norm_is_that_of_factors_where_nothing_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 2-D case above is one: without the penalty no gradient of that size is read."""
    read: list[int] = []
    module = __import__("torch_secorder.recording.gradient_norms", fromlist=["norm"])
    norm = module.norm
    monkeypatch.setattr(module, "norm", lambda grad: (read.append(grad.numel()), norm(grad))[1])
    model, x, y = wide(40)
    with FisherMonitor(model):
        for _ in range(4):
            read.clear()
            loss_of(model, x, y).backward()
    assert 1024 * 1024 not in read


@pytest.mark.parametrize("put", ["before the block", "before the forward", "before the backward"])
def test_the_gradients_norm_is_of_what_a_mask_leaves(put: str) -> None:
    model, x, y = wide(40)
    mask = torch.rand(1024, 1024, dtype=torch.float64).round()

    def masked(when: str) -> None:
        if put == when:
            model.first.weight.register_hook(lambda grad: grad * mask)

    masked("before the block")
    with FisherMonitor(model) as monitor:
        masked("before the forward")
        loss = loss_of(model, x, y)
        masked("before the backward")
        loss.backward()
    expected = float(model.first.weight.grad.square().sum())
    assert monitor.report().grad_sq_norm["first.weight"] == pytest.approx(expected, rel=1e-9)


def test_a_mask_that_is_put_on_in_the_backward_pass_itself_leaves_its_norms_out() -> None:
    model, x, y = wide(40)
    with FisherMonitor(model) as monitor:
        handle = model.first.register_forward_hook(
            lambda module, args, out: (
                out.register_hook(lambda _: module.weight.register_hook(torch.zeros_like) and None) and None
            )
        )
        loss_of(model, x, y).backward()
        handle.remove()
    assert not model.first.weight.grad.any()
    assert monitor.n_samples == 40
    assert monitor.report().grad_sq_norm.isna().all()


def skipped_on_a_rank(rank: int, world: int) -> list[int]:
    """One rank counts a pass and refuses one, the other refuses two; then all is added up, twice."""
    monitor = skipping(backward, not_finite) if rank == 0 else skipping(not_finite, two_calls)
    monitor.all_reduce().all_reduce()
    attrs = monitor.report().attrs
    nothing_counted = skipping(two_calls).all_reduce()
    return [attrs["skipped_passes"], attrs["n_passes"], nothing_counted.state_dict()["skipped_passes"]]


@pytest.mark.slow
def test_skipped_passes_are_added_over_ranks(tmp_path: Path) -> None:
    assert on_ranks(skipped_on_a_rank, 2, tmp_path) == [[3, 1, 2]] * 2


def test_evaluations_between_two_steps_do_not_count() -> None:
    """Every other step is watched, whatever is evaluated in between."""
    model, watched = classifier(), []
    with FisherMonitor(model, every=2) as monitor:
        for number in range(4):
            with torch.no_grad():
                model(batch(3)[0])
            before = monitor.results.statistics.n
            backward(model, *batch())
            if monitor.results.statistics.n > before:
                watched.append(number)
            with torch.no_grad():
                model(batch(3)[0])
    assert watched == [0, 2]
