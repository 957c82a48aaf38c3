"""The diagonal added up over channels: what is kept, that it is exact, and who reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from oracles import assert_equal
from torch_secorder import FisherMonitor, fisher_results
from torch_secorder.errors import ArgumentError
from torch_secorder.model.channels import ChannelSums
from torch_secorder.pruning import weight_saliency
from torch_secorder.quantization import quantization_sensitivity, rounded
from torch_secorder.testing import sample_gradients


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).cumsum(1).tanh()).sum(1)


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.scale = (
            nn.LSTM(4, 5, batch_first=True),
            nn.Linear(5, 3),
            nn.Parameter(torch.ones(())),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.head(self.layer(x)[0]).sum(1)


def images(n: int, *size: int) -> Tensor:
    return torch.randn(n, 4, *size)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), lambda: torch.randn(5, 4)),
    "few positions": (
        lambda: nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20), nn.Flatten()),
        lambda: torch.randn(5, 3, 40),
    ),
    "many positions": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Flatten()), lambda: torch.randn(5, 30, 4)),
    "gpt-2": (lambda: nn.Sequential(Conv1D(6, 4), nn.Tanh(), Conv1D(3, 6), nn.Flatten()), lambda: torch.randn(5, 3, 4)),
    "convolutions": (
        lambda: nn.Sequential(
            *(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 4), nn.Flatten())
        ),
        lambda: images(5, 6, 6),
    ),
    "large maps": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 3, stride=2), nn.Flatten()
        ),
        lambda: images(5, 16, 16),
    ),
    "one pixel's worth": (
        lambda: nn.Sequential(nn.Conv2d(4, 64, 3), nn.ReLU(), nn.Conv2d(64, 3, 3), nn.Flatten()),
        lambda: images(5, 5, 5),
    ),
    "small maps": (
        lambda: nn.Sequential(nn.Conv2d(4, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.Flatten()),
        lambda: images(5, 2, 2),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 3, 2), nn.Flatten()
        ),
        lambda: images(5, 3, 3),
    ),
    "tied": (Tied, lambda: torch.randint(7, (5, 6))),
    "recurrent": (Sequence, lambda: torch.randn(5, 6, 4)),
    "norms": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 2), nn.GroupNorm(2, 6), nn.PReLU(6), nn.Flatten(), nn.LayerNorm(12)),
        lambda: images(5, 3),
    ),
}


def channel_of(module: nn.Module, shape: tuple[int, ...], kind: str) -> tuple[int, int]:
    """The axis of the weight that counts the channels, and the groups on axis 1."""
    first = isinstance(module, (nn.ConvTranspose2d, Conv1D)) == (kind == "columns")
    return (0, 1) if first or len(shape) < 2 else (1, getattr(module, "groups", 1))


def added_up(squares: Tensor, axis: int, groups: int) -> Tensor:
    """One sum after the other."""
    if squares.dim() < 2:
        return squares
    if axis == 0:
        return torch.stack([row.sum() for row in squares])
    return torch.stack([part[:, c].sum() for part in squares.chunk(groups) for c in range(part.shape[1])])


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_sums_over_channels(case: str, dtype: torch.dtype, kind: str) -> None:
    make, data = CASES[case]
    model, x = make().to(dtype), data()
    x = x.to(dtype) if x.is_floating_point() else x
    y = torch.randint(model(x).shape[1], (5,))
    asked = {name: kind if p.dim() > 1 else "rows" for name, p in model.named_parameters()}
    found = fisher_results(model, cross_entropy, (x, y), diagonal=asked, progress=False).diagonal
    gradients = sample_gradients(model, cross_entropy, x, y)
    assert list(found) == list(gradients)
    total = sum(float(g.square().sum()) for g in gradients.values()) / 5
    for name, g in gradients.items():
        squares = g.square().mean(0)
        axis, groups = channel_of(model.get_submodule(name.rpartition(".")[0]), tuple(squares.shape), kind)
        assert_equal(found[name], added_up(squares, axis, groups), total, dtype)
        assert found[name].is_contiguous()


def watched(diagonal: Any, batches: int = 2, reduction: str = "mean") -> FisherMonitor:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with FisherMonitor(model, reduction, diagonal=diagonal, fisher="sampled") as monitor:
        for _ in range(batches):
            x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
            cross_entropy(model(x), y, reduction=reduction).backward()
    return monitor


def test_the_last_pattern_counts_and_what_none_matches_is_left_out() -> None:
    whole, some = watched(True).diagonal, watched({"*.weight": "rows", "2.*": "full", "2.weight": "columns"}).diagonal
    assert list(some) == ["0.weight", "2.weight", "2.bias"]
    torch.testing.assert_close(some["0.weight"], whole["0.weight"].sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(some["2.weight"], whole["2.weight"].sum(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(some["2.bias"], whole["2.bias"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_they_merge_and_come_back_from_files(reduction: str, tmp_path: Path) -> None:
    import safetensors

    asked = {"*": "full", "*.weight": "rows"}
    monitor = watched(asked, 3, reduction)
    monitor.save(tmp_path / "state")
    again = FisherMonitor.load(tmp_path / "state")
    torch.testing.assert_close(again.diagonal, monitor.diagonal, rtol=0, atol=0)
    again.merge(watched(asked, 3, reduction))
    factor = 1 if reduction == "mean" else 2
    for name, value in monitor.diagonal.items():
        torch.testing.assert_close(again.diagonal[name], factor * value, rtol=1e-12, atol=0)
    with pytest.raises(ArgumentError, match="different kinds"):
        again.merge(watched(True, 1, reduction))
    monitor.save_diagonal(tmp_path / "diagonal")
    with safetensors.safe_open(tmp_path / "diagonal", framework="pt") as file:
        assert json.loads(file.metadata()["channels"]) == {"0.weight": [0, 1], "2.weight": [0, 1]}
        assert tuple(file.get_tensor("0.weight").shape) == (6,)


def test_a_loaded_monitor_goes_on(tmp_path: Path) -> None:
    watched({"*.weight": "columns"}).save(tmp_path / "state")
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    monitor = FisherMonitor.load(tmp_path / "state", model)
    before = {name: value.sum() * 10 for name, value in monitor.diagonal.items()}
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    with monitor:
        cross_entropy(model(x), y).backward()
    for name, g in sample_gradients(model, cross_entropy, x, y).items():
        if name.endswith("weight"):
            torch.testing.assert_close(
                monitor.diagonal[name].sum() * 15, before[name] + g.square().sum(), rtol=1e-10, atol=0
            )


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("case", ["few positions", "many positions", "large maps", "one pixel's worth"])
def test_samples_that_are_not_finite_are_in_no_sum(case: str, kind: str) -> None:
    make, data = CASES[case]
    model, x = make().double(), data().double()
    y = torch.randint(model(x).shape[1], (5,))
    bad = x.clone()
    bad[2] = torch.inf
    with FisherMonitor(model, "sum", diagonal={"*.weight": kind}, nonfinite="skip") as monitor:
        cross_entropy(model(bad), y, reduction="sum").backward()
    others = [0, 1, 3, 4]
    with FisherMonitor(model, "sum", diagonal={"*.weight": kind}) as without:
        cross_entropy(model(x[others]), y[others], reduction="sum").backward()
    assert monitor.n_samples == 4
    torch.testing.assert_close(monitor.diagonal, without.diagonal, rtol=1e-10, atol=1e-20)


def test_they_take_the_place_of_the_norms_where_both_need_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """One product for both: that of the norms is not made at all."""
    monkeypatch.setattr("torch_secorder.recording.parameter_norms.squared_norms_of", None)
    for case in ("many positions", "large maps"):
        make, data = CASES[case]
        model, x = make().double(), data().double()
        y = torch.randint(model(x).shape[1], (5,))
        weights = [name for name, p in model.named_parameters() if p.dim() > 1]
        found = fisher_results(
            *(model, cross_entropy, (x, y)), parameters=weights, diagonal={"*": "rows"}, verify=False, progress=False
        )
        for name, g in sample_gradients(model, cross_entropy, x, y, names=weights).items():
            assert float(found.report().loc[name, "fisher_trace"]) == pytest.approx(
                float(g.square().sum()) / 5, rel=1e-8
            )


def test_unused_parameters_have_zeros() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Conv2d(4, 6, 3, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    asked = {"*.weight": "columns"}
    found = fisher_results(
        *(Unused(), cross_entropy, (torch.randn(5, 4), torch.randint(3, (5,)))), diagonal=asked, progress=False
    ).diagonal
    assert torch.equal(found["unused.weight"], torch.zeros(4))


def test_decisions_read_them() -> None:
    rows = watched({"*.weight": "rows"})
    model = rows._watched.model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_secorder.curvature.warn_if_no_prediction", lambda fisher: None)
        sensitivity = quantization_sensitivity(model, rows, bits=3)
        saliency = weight_saliency(model, rows)
    assert sensitivity.attrs["basis"] == "channels"
    for name, sums in rows.diagonal.items():
        weight = model.get_parameter(name).detach()
        error = (rounded(weight, 3, per="channel") - weight).square().sum(1)
        inputs = weight.shape[1]
        assert sensitivity.loc[name, 3] == pytest.approx(0.5 * float((sums / inputs * error).sum()), rel=1e-10)
        torch.testing.assert_close(saliency[name], 0.5 * sums[:, None] / inputs * weight.square(), rtol=1e-10, atol=0)
    assert quantization_sensitivity(model, watched(True), bits=3).attrs["basis"] == "diagonal"


class OtherGroups(nn.Module):
    """The weight of a convolution, used with other groups than the layer's own."""

    def __init__(self, own: int, used: int, kernel: int) -> None:
        super().__init__()
        self.layer, self.used = nn.Conv2d(4 * own, 8, kernel, groups=own, bias=False), used

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.layer.weight, groups=self.used).tanh().sum((2, 3))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("own", "used"), [(2, 1), (1, 2), (2, 2)])
def test_a_channel_is_one_of_the_layer_whose_weight_it_is(own: int, used: int, kernel: int) -> None:
    torch.manual_seed(0)
    model, x = OtherGroups(own, used, kernel).double(), torch.randn(3, 4 * used, 5, 5).double()
    with FisherMonitor(model, "sum", diagonal={"*": "columns"}) as monitor:
        model(x).square().sum().backward()
    squares = torch.zeros_like(model.layer.weight)
    for one in x:
        squares += torch.autograd.grad(model(one[None]).square().sum(), model.layer.weight)[0].square()
    expected = squares.unflatten(0, (own, -1)).sum((1, 3, 4)).flatten()
    assert_equal(monitor.diagonal["layer.weight"], expected, expected.sum(), torch.float64)


@pytest.mark.parametrize("sums", [ChannelSums(0), ChannelSums(1), ChannelSums(1, 2)], ids=str)
def test_channels_spread_their_mean(sums: ChannelSums) -> None:
    value = torch.randn(4, 3, 2)
    spread = sums.spread(sums.of(value), value.shape)
    assert spread.shape == value.shape
    torch.testing.assert_close(sums.of(spread), sums.of(value))
    assert spread.flatten().unique().numel() == sums.length(value.shape)


@pytest.mark.parametrize(
    ("diagonal", "words"),
    [
        ("rows", "must be True, False, or a mapping"),
        ({}, "must be True, False, or a mapping"),
        ({"*.weight": "row"}, r"diagonal\['\*\.weight'\] must be one of 'full', 'rows', 'columns'"),
        ({"*.wait": "rows"}, r"no analyzed parameter matches '\*\.wait'; there are 0\.weight"),
        ({"*": "columns"}, r"0\.bias of shape \(6,\) has no columns"),
    ],
)
def test_nonsense_is_refused_in_words(diagonal: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        watched(diagonal)
