"""What is predicted of a trained network against what is then measured: roundings of activations, and channels that go."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from torch_secorder import fisher_results
from torch_secorder.pruning import Gates, prune, pruning_sensitivity
from torch_secorder.quantization import quantization_sensitivity

pytestmark = pytest.mark.slow

sklearn = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Sequential, Tensor]:
    """A classifier of digits that reads 97 % of what it was trained on, and 200 images, in float64."""
    generator = torch.Generator().manual_seed(0)
    images, labels = sklearn.load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(10):
        for batch in torch.randperm(1500, generator=generator).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    model = model.double().eval().requires_grad_(True)
    assert (model(x[:1500].double()).argmax(1) == y[:1500]).double().mean() > 0.97
    return model, x[:200].double()


@contextmanager
def changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The module's output goes through a function."""
    handle = module.register_forward_hook(lambda module, args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def divergence(model: nn.Module, x: Tensor, before: Tensor) -> float:
    after = model(x).log_softmax(1)
    return float((before.exp() * (before - after)).sum(1).mean())


@torch.no_grad()
def prediction(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).log_softmax(1)


def test_rounded_activations(trained: tuple[nn.Sequential, Tensor]) -> None:
    model, x = trained
    results = fisher_results(model, None, (x, None), fisher="exact", activations=True, progress=False)
    widths = (4, 5, 6, 8)
    found = quantization_sensitivity(model, results, bits=widths, scheme="affine", activations=True)
    before = prediction(model, x)
    pairs: list[dict[str, Any]] = []
    for name, row in found[found["kind"] == "activation"].iterrows():
        low, high = (min(0.0, results.activations.loc[name, "min"]), max(0.0, results.activations.loc[name, "max"]))
        for bits in widths:
            step = (high - low) / (2**bits - 1)
            with changed(model.get_submodule(str(name)), lambda a, step=step: (a / step).round() * step):
                pairs.append({"bits": bits, "predicted": row[bits], "measured": divergence(model, x, before)})
    table = pd.DataFrame(pairs)
    assert len(table) == 8 * len(widths)
    ratio = table["predicted"] / table["measured"]
    assert 0.8 < ratio.median() < 1.4
    assert ratio.between(0.5, 2.5).all()
    for _, part in table.groupby("bits"):
        assert part["predicted"].corr(part["measured"], method="spearman") > 0.9


@pytest.fixture(scope="module")
def gates(trained: tuple[nn.Sequential, Tensor]) -> Gates:
    """Of 30 passes with labels that were drawn from the prediction; the last layer, whose outputs are classes, stays."""
    model, x = trained
    with torch.random.fork_rng(), Gates(model, lambda name: name in ("0", "2", "5"), fisher="sampled") as found:
        torch.manual_seed(0)
        for _ in range(30):
            outputs = model(x)
            labels = torch.distributions.Categorical(logits=outputs).sample()
            nn.functional.cross_entropy(outputs, labels).backward()
    return found


@pytest.mark.parametrize(
    ("closed", "order", "low", "high"), [(0.05, 0.97, 0.9, 1.1), (1.0, 0.9, 0.6, 1.2)], ids=["a little", "entirely"]
)
def test_gates_that_close(
    closed: float, order: float, low: float, high: float, trained: tuple[nn.Sequential, Tensor], gates: Gates
) -> None:
    """One channel at a time, of those that are awake. To second order the rise goes with the square of the step."""
    model, x = trained
    before = prediction(model, x)
    for name, saliency in gates.saliency.items():
        pairs = []
        for k in (saliency > 0).nonzero().flatten().tolist():
            factor = torch.ones(len(saliency), dtype=torch.float64)
            factor[k] -= closed
            factor = factor.view([-1, 1, 1] if name != "5" else [-1])
            with changed(model.get_submodule(name), lambda a, factor=factor: a * factor):
                pairs.append((float(saliency[k]) * closed**2, divergence(model, x, before)))
        table = pd.DataFrame(pairs, columns=["predicted", "measured"])
        assert len(table) > 10
        assert table["predicted"].corr(table["measured"], method="spearman") > order
        assert low < (table["predicted"] / table["measured"]).median() < high


def test_channels_that_go_together(trained: tuple[nn.Sequential, Tensor], gates: Gates) -> None:
    """What the sum over channels leaves out is what they do to each other: it falls short as more of them go."""
    model, x = trained
    before = prediction(model, x)
    predicted = pruning_sensitivity(gates.saliency, (0.1, 0.25, 0.5))
    for name, amount in itertools.product(("0", "2"), (0.1, 0.25, 0.5)):
        weight = model.get_submodule(name).weight.detach()
        measured = {}
        for by, scores in (("gates", gates.saliency[name]), ("magnitude", weight.flatten(1).norm(dim=1))):
            pruned = copy.deepcopy(model)
            prune(pruned, {name: scores}, amount)
            measured[by] = divergence(pruned, x, before)
        assert 0.25 < predicted.loc[name, amount] / measured["gates"] < 2
        assert measured["gates"] < measured["magnitude"]
