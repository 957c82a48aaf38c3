"""In a steady step the host waits for the device once, and few kernels are added; what cancels is put in order all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import pretend
from benchmarks.launches import MODELS, added
from torch_secorder import FisherMonitor
from torch_secorder.errors import CoverageError
from torch_secorder.recording import doubts

EXACT = 1e-8
# Launches added per parameter tensor: the goal for all is five.
MOST = 5.0
# Waits of a search: one for the random numbers of each length that it meets first, and five more.
MOST_OF_A_SEARCH = 24


@pytest.mark.parametrize("name", MODELS)
def test_a_steady_step_waits_once_and_adds_few_launches(name: str) -> None:
    found = added(MODELS[name][1], steps=4)  # the first that is not checked
    assert found.row()["waits"] == 1, found.monitored.places
    assert found.row()["per_tensor"] <= MOST


OPTIONS: dict[str, dict[str, Any]] = {
    "diagonal": {"diagonal": True},
    "diagonal by rows": {"diagonal": {"*": "rows"}},
    "per_sample": {"per_sample": True},
    "activations": {"activations": True},
    "all parameters": {"parameters": "all"},
    "skip": {"nonfinite": "skip", "on_refusal": "skip"},
    "repeated_calls": {"repeated_calls": "new"},
    "max_memory": {"max_memory": 2**22},
    "loss_scale": {"loss_scale": 0.5},
    "everything": {"diagonal": True, "per_sample": True, "activations": True, "nonfinite": "skip"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["resnet", "gpt2"])
def test_a_steady_step_waits_once_whatever_is_kept(name: str, options: dict[str, Any]) -> None:
    found = added(MODELS[name][1], steps=4, **options)
    assert found.row()["waits"] == 1, found.monitored.places


MORE_OPTIONS: dict[str, dict[str, Any]] = {
    "diagonal by columns": {"diagonal": {"*": "rows", "*c_*.weight": "columns"}},
    "on_output": {"on_output": lambda name, output, grad: None},
}


@pytest.mark.parametrize("options", MORE_OPTIONS.values(), ids=MORE_OPTIONS)
def test_a_steady_step_waits_once_for_options_that_not_every_model_takes(options: dict[str, Any]) -> None:
    found = added(MODELS["gpt2"][1], steps=4, **options)
    assert found.row()["waits"] == 1, found.monitored.places


@pytest.mark.usefixtures("_without_float64")
@pytest.mark.parametrize("options", [{}, OPTIONS["everything"]], ids=["traces", "everything"])
def test_a_steady_step_waits_once_on_a_device_without_float64(options: dict[str, Any]) -> None:
    assert added(MODELS["mlp"][1], steps=4, **options).row()["waits"] == 1


def test_samples_alone_are_compared_as_those_of_single_precision_although_norms_go_to_the_host_in_double() -> None:
    setting = MODELS["bert"][1]()
    model, x, y = (pretend.moved(value) for value in (setting.model, setting.inputs, setting.targets))
    with FisherMonitor(model) as monitor:
        outputs = model(x)
        loss = setting.loss_fn(outputs, y)
        monitor.verify(loss)
        loss.backward()
    assert monitor.n_samples == len(x)


@pytest.mark.parametrize("name", ["gpt2", "llama", "resnet"])
def test_the_search_of_a_first_step_waits_as_often_for_few_layers_as_for_many(name: str) -> None:
    """For the random numbers that go to the device, and for what came back, all of it together."""
    counts = added(MODELS[name][1], steps=1).monitored
    searching = (" batch_axis/", "double_precision.py")  # the second of which takes to the host what came back
    waits = {place: count for place, count in counts.places.items() if any(file in place for file in searching)}
    assert sum(waits.values()) <= MOST_OF_A_SEARCH, waits
    assert counts.operations["amin"] > 10  # There was a search, which looks at the smallest number of each place.


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of what is kept until a pass is over."""
    sizes: list[int] = []
    make = doubts.Doubt

    def noted(*args: Any) -> doubts.Doubt:
        found = make(*args)
        sizes.append(sum(x.nbytes for x in doubts._tensors(found.form)))
        return found

    monkeypatch.setattr(doubts, "Doubt", noted)
    return sizes


class Halves(nn.Module):
    """The second half of the positions nearly repeats the first, and the loss takes one from the other."""

    def __init__(self, leftover: float) -> None:
        super().__init__()
        self.layer, self.last, self.leftover = nn.Linear(64, 64, bias=False), nn.Linear(64, 3), leftover

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layer(torch.cat([x, x * (1 + self.leftover)], 1)).chunk(2, 1)
        return self.last((first - second).mean(1) / self.leftover)


def data(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, 64, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)


def trained(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], **options: Any
) -> tuple[FisherMonitor, list[pretend.Counts]]:
    """The monitor after a step on each batch, and what each step counted."""
    steps = []
    with FisherMonitor(model, per_sample=True, **options) as monitor:
        for x, y in batches:
            model.zero_grad()
            with pretend.counting() as counts:
                (model(x) - y).square().sum(1).mean().backward()
            steps.append(counts)
    return monitor, steps


def require_same(found: FisherMonitor, right: FisherMonitor) -> None:
    a, b = (torch.from_numpy(monitor.per_sample.to_numpy(dtype="float64", copy=True)) for monitor in (found, right))
    torch.testing.assert_close(a, b, rtol=EXACT, atol=0)
    for name in ("fisher_trace", "gradient_sq_norm"):
        if name in right.report():
            assert found.report()[name].to_dict() == pytest.approx(
                right.report()[name].to_dict(), rel=EXACT, nan_ok=True
            )


@pytest.mark.parametrize("leftover", [1.0, 1e-4], ids=["nothing cancels", "all cancels"])
def test_what_cancels_is_recomputed_and_takes_the_direct_form_from_then_on(leftover: float, kept: list[int]) -> None:
    model, batches = Halves(leftover).double(), [data() for _ in range(6)]
    right, _ = trained(model, batches)
    assert not kept  # the CPU is asked at once
    found, steps = trained(pretend.moved(model), pretend.moved(batches))
    require_same(found, right)
    cancels = leftover < 1
    assert len(kept) == (1 if cancels else 6 - len(_checked(steps)))
    assert steps[-1].waits.total() == 1


def _checked(steps: list[pretend.Counts]) -> list[pretend.Counts]:
    """The steps whose sums were compared with autograd's, for which norms are taken at once."""
    return [step for step in steps if step.waits.total() > 1]


def test_more_than_the_limit_is_not_kept(kept: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = Halves(1e-4).double(), [data() for _ in range(6)]
    right, _ = trained(model, batches)
    monkeypatch.setattr(doubts, "KEPT_BYTES", 100)
    found, steps = trained(pretend.moved(model), pretend.moved(batches))
    require_same(found, right)
    assert not kept
    assert steps[-1].waits.total() == 1


@pytest.mark.parametrize("limit", [2**12, 2**16, 2**24])
def test_what_is_kept_counts_towards_max_memory(limit: int, kept: list[int]) -> None:
    model, batches = Halves(1e-4).double(), [data() for _ in range(6)]
    right, _ = trained(model, batches)
    found, _ = trained(pretend.moved(model), pretend.moved(batches), max_memory=limit)
    require_same(found, right)
    assert sum(kept) <= limit // 2
    assert bool(kept) == (limit == 2**24)


def test_factors_that_were_changed_in_place_are_not_believed() -> None:
    """The layer's input is overwritten once its gradient is there, before the pass is over. Small calls would wait."""
    model, (x, y) = pretend.moved(Halves(1.0).double()), pretend.moved(data(n=100))
    with FisherMonitor(model):
        for _ in range(3):  # of which some are checked, for which norms are taken at once
            (model(x) - y).square().sum(1).mean().backward()
        model.leftover = 1e-4
        inputs: list[Tensor] = []
        model.layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        model.layer.weight.register_post_accumulate_grad_hook(lambda _: (inputs[0].zero_(), None)[1])
        loss = (model(x) - y).square().sum(1).mean()
        with pytest.raises(CoverageError, match=r"layer\.weight: digits have cancelled"):
            loss.backward()


def test_samples_that_are_not_finite_cost_no_further_wait() -> None:
    model, batches = Halves(1.0).double(), [data() for _ in range(6)]
    batches[-1][0][2, 0, 0] = float("nan")
    options = {"nonfinite": "skip", "diagonal": True, "activations": True}
    right, _ = trained(model, batches, **options)
    found, steps = trained(pretend.moved(model), pretend.moved(batches), **options)
    require_same(found, right)
    assert found.n_samples == right.n_samples == 29
    for name, squares in right.diagonal.items():
        torch.testing.assert_close(found.diagonal[name].cpu(), squares, rtol=EXACT, atol=0)
    pd.testing.assert_frame_equal(found.activations, right.activations, rtol=EXACT)
    assert steps[-1].waits.total() == 1


def test_a_diagonal_that_was_loaded_goes_on_where_the_model_is(tmp_path: Path) -> None:
    model, (x, y) = Halves(1.0).double(), data()
    right, _ = trained(model, [(x, y)] * 2, diagonal=True)
    found, _ = trained(pretend.moved(model), [pretend.moved((x, y))], diagonal=True)
    found.save(tmp_path / "monitor")
    with FisherMonitor.load(tmp_path / "monitor", model) as monitor:
        (model(pretend.moved(x)) - pretend.moved(y)).square().sum(1).mean().backward()
    for name, squares in right.diagonal.items():
        assert monitor.diagonal[name].device.type == "pretend"
        torch.testing.assert_close(monitor.diagonal[name].cpu(), squares, rtol=EXACT, atol=0)


def test_rows_of_an_embedding_are_added_up_without_asking_how_many_there_are() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.last = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.last(self.words(ids).tanh()).mean(1)

    model = Words().double()
    batches = [(torch.randint(9, (5, 12)), torch.randn(5, 3, dtype=torch.float64)) for _ in range(6)]
    right, _ = trained(model, batches)
    found, steps = trained(pretend.moved(model), pretend.moved(batches))
    require_same(found, right)
    assert steps[-1].waits.total() == 1
