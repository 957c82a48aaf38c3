"""The exact Fisher where a product with a matrix made the outputs: its own part at once, the rest from before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from oracles import assert_equal, exact_fisher, total, trace
from torch_secorder import fisher_report, fisher_results, generalized_fisher_trace
from torch_secorder.autograd.graph_pass import GraphPass
from torch_secorder.autograd.self_test import hooks_are_seen
from torch_secorder.errors import VerificationError
from torch_secorder.graph.last_layer import last_product
from torch_secorder.likelihoods import LastLayer, likelihood
from torch_secorder.recording.sample_norms import SampleNorms
from torch_secorder.running import by_last_layer
from torch_secorder.running.by_last_layer import ExactByLastLayer
from torch_secorder.running.outputs_backward import OutputsBackward
from torch_secorder.running.run import HookedForward

pytestmark = pytest.mark.skipif(not hooks_are_seen(), reason="this torch does not show whether the factors may be read")

LOSS_TYPES = ["nll", "bce", "mse", "poisson"]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of each backward pass whether it goes through the whole graph or a part of it."""
    found: list[str] = []
    of_seed, of_seeds, at = OutputsBackward.of_seed, OutputsBackward.of_seeds, OutputsBackward.at

    def whole(self: OutputsBackward, seed: Tensor, passes: GraphPass | None = None) -> SampleNorms:
        found.extend(["whole"] * (passes is None))
        return of_seed(self, seed, passes)

    def parts(self: OutputsBackward, seeds: Iterable[Tensor], passes: GraphPass) -> Tensor:
        return of_seeds(self, (found.append("part") or seed for seed in seeds), passes)  # type: ignore[func-returns-value]  # It notes the pass.

    def own(self: OutputsBackward, gradients: Mapping[Node, Tensor]) -> Tensor:
        product = last_product(self.graph.outputs)
        found.extend(["part"] * (product is not None and product in gradients))
        return at(self, gradients)

    monkeypatch.setattr(OutputsBackward, "of_seed", whole)
    monkeypatch.setattr(OutputsBackward, "of_seeds", parts)
    monkeypatch.setattr(OutputsBackward, "at", own)
    return found


def network(classes: int, width: int = 6, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, width), nn.Tanh(), nn.Linear(width, classes, bias)
    ).double()


def unchecked(model: nn.Module, x: Tensor, *args: object, **options: object) -> Tensor:
    """The value of the fourth call, in which nothing is verified."""
    values = [generalized_fisher_trace(model, model(x), *args, **options) for _ in range(4)]  # type: ignore[arg-type]
    assert values[0] == values[3]
    return values[3]


@pytest.mark.parametrize("classes", [2, 4, 30])
@pytest.mark.parametrize(("few", "n"), [(0, 5), (128, 5), (128, 1)])  # one sample goes another way
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_it_is_exact(
    loss_type: str, few: int, classes: int, n: int, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_last_layer, "FEW_CLASSES", few)
    model, x = network(classes), torch.randn(n, 4, dtype=torch.float64)
    y = torch.randint(classes, (n,)) if loss_type == "nll" else None
    expected = total(trace(exact_fisher(model, x, y, loss_type)))
    assert_equal(unchecked(model, x, y, loss_type), expected, expected)
    # Of one sample all is that sample's, so that a weight's use is found before the product.
    assert set(passes) == ({"part"} if n > 1 else {"whole"})


@pytest.mark.parametrize("classes", [3, 40])
def test_ignored_targets_count_for_nothing(classes: int) -> None:
    model, x = network(classes), torch.randn(5, 4, dtype=torch.float64)
    y = torch.tensor([0, -100, 1, 2, -100])
    expected = total(trace(exact_fisher(model, x, y)))
    assert_equal(unchecked(model, x, y), expected, expected)


@pytest.mark.parametrize("classes", [3, 40])
def test_single_precision(classes: int, passes: list[str]) -> None:
    model, x = network(classes).float(), torch.randn(7, 4)
    expected = total(trace(exact_fisher(model, x)))
    assert_equal(unchecked(model, x, None), expected, expected, torch.float32)
    assert set(passes) == {"part"}


@pytest.mark.parametrize("few", [0, 128])
@pytest.mark.parametrize("classes", [3, 12])  # less than the layer has inputs, and more
def test_a_class_that_is_nearly_certain(classes: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither 1 - p nor the difference of two products with the matrix has a digit there."""
    monkeypatch.setattr(by_last_layer, "FEW_CLASSES", few)
    model, x = network(classes), torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        model[4].bias[1] += 45.0
    expected = total(trace(exact_by_logits(model, x)))
    assert 0 < expected < 1e-14
    assert_equal(unchecked(model, x, None), expected, expected)


def exact_by_logits(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """sum_{i<j} p_i p_j ||grad (f_i - f_j)||^2, [n]: the same trace without a difference of probabilities."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for one in x:
        f = model(one[None])[0]
        p = f.detach().softmax(0)
        sums = dict.fromkeys(rows, torch.zeros((), dtype=torch.float64))
        for i in range(len(f)):
            for j in range(i):
                gradients = torch.autograd.grad(f[i] - f[j], list(model.parameters()), retain_graph=True)
                for name, g in zip(rows, gradients, strict=True):
                    sums[name] = sums[name] + p[i] * p[j] * g.square().sum()
        for name, value in sums.items():
            rows[name].append(value)
    return {name: torch.stack(values) for name, values in rows.items()}


def test_there_are_no_more_passes_than_the_last_layer_has_inputs(passes: list[str]) -> None:
    model, x = network(40), torch.randn(5, 4, dtype=torch.float64)
    unchecked(model, x, None)
    passes.clear()
    generalized_fisher_trace(model, model(x), None)
    assert len(passes) == 2 + 1 + 6  # the fifth call is verified, by two of them


class Tied(nn.Module):
    """The last layer's weight also makes its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.hidden(x) @ self.words).tanh() @ self.words.T


class Scaled(nn.Module):
    """The product is scaled, and its bias as well."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.weight, self.bias = (
            nn.Linear(4, 4),
            nn.Parameter(torch.randn(4, 5)),
            nn.Parameter(torch.randn(5)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, self.hidden(x).tanh(), self.weight, alpha=2.0, beta=3.0)


class OneBias(nn.Module):
    """All outputs share one bias, whose gradient is the sum of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.weight, self.bias = (
            nn.Linear(4, 4),
            nn.Parameter(torch.randn(4, 5)),
            nn.Parameter(torch.randn(1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, self.hidden(x).tanh(), self.weight)


class Normalized(nn.Module):
    """The matrix is computed from a parameter by more than moving its entries."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x).tanh() @ (self.weight / self.weight.norm(dim=0))


class OfData(nn.Module):
    """The matrix depends on the data, and parameters come before it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.gain, self.weight = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x).tanh() @ (self.weight * self.gain(torch.ones_like(x[:1])).T)


def rows_of_samples() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 5), nn.Identity(), nn.Tanh())


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "scaled": Scaled,
    "one bias": OneBias,
    "normalized": Normalized,
    "of data": OfData,
    "no product": rows_of_samples,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_last_layers_take_whole_passes(name: str, passes: list[str]) -> None:
    model, x = OTHERS[name]().double(), torch.randn(3, 4, dtype=torch.float64)
    expected = total(trace(exact_fisher(model, x)))
    assert_equal(unchecked(model, x, None), expected, expected)
    assert set(passes) == {"whole"}


@pytest.mark.parametrize("frozen", ["4.weight", "4.bias", "0.weight", "before"])
def test_partly_frozen(frozen: str) -> None:
    model, x = network(5), torch.randn(3, 4, dtype=torch.float64)
    for name, p in model.named_parameters():
        p.requires_grad_(not (name == frozen or (frozen == "before" and not name.startswith("4"))))
    expected = total(trace(exact_fisher(model, x)))
    assert_equal(unchecked(model, x, None), expected, expected)


def test_only_the_last_layer_is_analyzed() -> None:
    model, x = network(5), torch.randn(3, 4, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters() if name.startswith("4")]
    expected = total({name: value for name, value in trace(exact_fisher(model, x)).items() if name in names})
    assert_equal(unchecked(model, x, None, parameters=names), expected, expected)


def test_a_wrong_root_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check sees the parts themselves: it falls back to samples one by one, with a warning, and the right number."""
    model, x = network(5), torch.randn(3, 4, dtype=torch.float64)
    found = OutputsBackward.before_last_product
    monkeypatch.setattr(
        OutputsBackward, "before_last_product", lambda self, positions: (found(self, positions)[0], None)
    )  # type: ignore[index]
    expected = total(trace(exact_fisher(model, x)))
    with pytest.warns(UserWarning, match="each sample takes a backward pass"):
        value = generalized_fisher_trace(model, model(x), None)
    assert_equal(value, expected, expected)


@pytest.mark.parametrize("few", [0, 128])
@pytest.mark.parametrize("classes", [3, 30])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_roots_are_those_of_the_curvature_before_the_layer(
    loss_type: str, classes: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_last_layer, "FEW_CLASSES", few)
    outputs, h, m = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, classes), (4, 6), (6, classes)))
    y = torch.tensor([0, 1, -100, 2]) if loss_type == "nll" else None
    model = likelihood(loss_type, outputs, y)
    seeds = torch.stack(list(model.exact_output_gradients(outputs)), 1)
    exact = ExactByLastLayer.of(model, outputs, LastLayer(h, m))
    roots = torch.stack(list(exact.input_gradients), 1)
    assert roots.shape[1] == (6 if classes == 30 else seeds.shape[1])
    expected = seeds @ m.T
    assert torch.allclose(roots.mT @ roots, expected.mT @ expected, rtol=1e-12, atol=1e-13)
    assert torch.allclose(exact.traces, seeds.square().sum((1, 2)), rtol=1e-12)


# fisher_report, which runs the model


def reported(model: nn.Module, x: Tensor, y: Tensor | None = None, **options: object) -> dict[str, Tensor]:
    report = fisher_report(model, None, (x, y), fisher="exact", progress=False, **options)  # type: ignore[arg-type]  # The options differ by test.
    return {name: torch.tensor(value) for name, value in report["fisher_trace"].items()}


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("classes", [2, 4, 30])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_each_parameter_of_a_report(loss_type: str, classes: int, n: int, ends: list[bool]) -> None:
    model, x = network(classes), torch.randn(n, 4, dtype=torch.float64)
    y = torch.randint(classes, (n,)) if loss_type == "nll" else None
    expected = trace(exact_fisher(model, x, y, loss_type))
    for name, value in reported(model, x, y, loss_type=loss_type).items():
        assert_equal(value, expected[name], total(expected))
    assert ends.count(True) == 2  # one for the check, and one for the batch


def test_a_report_needs_no_more_passes_than_the_last_layer_has_inputs(ends: list[bool]) -> None:
    reported(network(40), torch.randn(5, 4, dtype=torch.float64), verify=False)
    assert ends == [True, *[False] * 6]


class UsedTwice(nn.Module):
    """The last layer's weight also makes its inputs, outside of the layer's call."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.hidden(x) @ self.last.weight).tanh())


class CalledTwice(nn.Module):
    """The last layer also makes its own inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.last(x).tanh())


def parametrized() -> nn.Module:
    model = network(5)
    nn.utils.parametrizations.weight_norm(model[4])
    return model


def hooked(kind: str) -> nn.Module:
    """A network in which a hook of the user's scales the gradient of the outputs."""

    class Hooked(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            outputs = super().forward(x)
            if kind == "tensor":
                outputs.register_hook(lambda grad: 2 * grad)
                return outputs
            assert outputs.grad_fn is not None
            outputs.grad_fn.register_prehook(lambda grads: (2 * grads[0],))
            return outputs

    return Hooked(*network(5))


HOOKED = {f"a hook, {kind}": partial(hooked, kind) for kind in ("tensor", "node")}
WHOLE = OTHERS | HOOKED | {"used twice": UsedTwice, "called twice": CalledTwice, "parametrized": parametrized}


@pytest.mark.parametrize("name", WHOLE)
def test_reports_of_other_last_layers_take_whole_passes(name: str, ends: list[bool]) -> None:
    model, x = WHOLE[name]().double(), torch.randn(3, 4, dtype=torch.float64)
    expected = trace(exact_fisher(model, x))
    for parameter, value in reported(model, x).items():
        assert_equal(value, expected[parameter], total(expected))
    assert not any(ends)


@pytest.mark.parametrize("chosen", [["4.*"], ["0.*"], ["4.bias", "2.weight"], ["4.weight", "0.bias"]])
def test_a_report_of_some_parameters(chosen: list[str]) -> None:
    model, x = network(5), torch.randn(3, 4, dtype=torch.float64)
    expected = trace(exact_fisher(model, x))
    found = reported(model, x, parameters=chosen)
    assert found
    for parameter, value in found.items():
        assert_equal(value, expected[parameter], total(expected))


def test_a_diagonal_takes_whole_passes(ends: list[bool]) -> None:
    """It depends on more than the size of each sample's output gradient."""
    model, x = network(5), torch.randn(3, 4, dtype=torch.float64)
    results = fisher_results(model, None, (x, None), fisher="exact", diagonal=True, progress=False)
    expected = trace(exact_fisher(model, x))
    for parameter, value in results.diagonal.items():
        assert_equal(value.sum(), expected[parameter], total(expected))
    assert not any(ends)


def test_the_check_of_a_report_sees_a_wrong_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(5), torch.randn(3, 4, dtype=torch.float64)
    last_layer = HookedForward.last_layer

    def wrong(self: HookedForward, outputs: Tensor) -> LastLayer | None:
        found = last_layer(self, outputs)
        return None if found is None else LastLayer(found.inputs, 1.1 * found.matrix)

    monkeypatch.setattr(HookedForward, "last_layer", wrong)
    with pytest.raises(VerificationError, match=r"0\.weight"):
        reported(model, x)
