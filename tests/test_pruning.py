"""Saliencies against loops and explicit gates, and pruning through PyTorch's own masks and Torch-Pruning's own pruner."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from torch_secorder import FisherMonitor, fisher_report, fisher_results
from torch_secorder.errors import (
    ArgumentError,
    CoupledSamplesError,
    CoverageError,
    LifecycleError,
    NonFiniteError,
    ShapeError,
)
from torch_secorder.pruning import Gates, GroupImportance, prune, pruning_sensitivity, top_k_mask, weight_saliency

cross_entropy = nn.functional.cross_entropy


def net(inplace: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace),
        nn.ConvTranspose2d(4, 3, 2),
        nn.ReLU(inplace),
        nn.Flatten(),
        nn.Linear(75, 6),
        nn.ReLU(inplace),
        nn.Linear(6, 4),
    ).eval()


class Gated(nn.Module):
    """A module's output times one gate for each of its channels."""

    def __init__(self, module: nn.Module, axis: int, channels: int):
        super().__init__()
        self.module, self.axis = module, axis
        self.gate = nn.Parameter(torch.ones(channels))

    def forward(self, *args: Tensor) -> Tensor:
        output = self.module(*args)
        sides = [1] * output.dim()
        sides[self.axis] = -1
        return output * self.gate.view(sides)


def gates_by_hand(model: nn.Module, name: str, axis: int, x: Tensor, labels: Tensor, channels: int) -> Tensor:
    """Mean over samples of the squared gradient of explicit gates, one sample at a time."""
    gated = copy.deepcopy(model)
    wrapper = Gated(gated.get_submodule(name), axis, channels)
    owner, _, local = name.rpartition(".")
    setattr(gated.get_submodule(owner), local, wrapper)
    total = torch.zeros(channels, dtype=torch.float64)
    for n in range(len(x)):
        loss = cross_entropy(gated(x[n : n + 1]), labels[n : n + 1])
        total += torch.autograd.grad(loss, wrapper.gate)[0].double().square()
    return total / len(x)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("inplace", [False, True])
def test_gates_are_those_of_explicit_gates(reduction: str, inplace: bool) -> None:
    model = net(inplace)
    x, labels = torch.randn(7, 2, 6, 6), torch.randint(4, (7,))
    with Gates(model, reduction=reduction, fisher="sampled") as gates:
        for part, y in zip(x.split(4), labels.split(4), strict=True):
            cross_entropy(model(part), y, reduction=reduction).backward()
    assert gates.n_samples == 7
    assert list(gates.fisher) == ["0", "3", "6", "8"]
    for name, channels in {"0": 4, "3": 3, "6": 6, "8": 4}.items():
        expected = gates_by_hand(net_without_inplace(model), name, 1, x, labels, channels)
        torch.testing.assert_close(gates.fisher[name], expected, rtol=1e-4, atol=1e-10)
        torch.testing.assert_close(gates.saliency[name], gates.fisher[name] / 2)


def net_without_inplace(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return other


def test_gates_of_norms_and_of_tokens() -> None:
    model = net()
    x, labels = torch.randn(5, 2, 6, 6), torch.randint(4, (5,))
    with Gates(model, modules=(nn.BatchNorm2d,)) as gates:
        cross_entropy(model(x), labels).backward()
    torch.testing.assert_close(gates.fisher["1"], gates_by_hand(model, "1", 1, x, labels, 4), rtol=1e-4, atol=1e-10)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hidden(x).tanh()).mean(1)

    tokens = Tokens()
    x = torch.randn(5, 7, 3)
    with Gates(tokens, modules=lambda name: name == "hidden") as gates:
        cross_entropy(tokens(x), labels).backward()
    expected = gates_by_hand(tokens, "hidden", 2, x, labels, 5)
    torch.testing.assert_close(gates.fisher["hidden"], expected, rtol=1e-4, atol=1e-10)


def test_all_calls_of_a_layer_share_its_gates() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    model = Twice()
    x, labels = torch.randn(6, 4), torch.randint(4, (6,))
    with Gates(model) as gates:
        cross_entropy(model(x), labels).backward()
    torch.testing.assert_close(
        gates.fisher["layer"], gates_by_hand(model, "layer", 1, x, labels, 4), rtol=1e-4, atol=1e-10
    )


def test_gates_beside_a_monitor_cost_no_pass_and_leave_nothing() -> None:
    model = net()
    x, labels = torch.randn(5, 2, 6, 6), torch.randint(4, (5,))
    cross_entropy(model(x), labels).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with FisherMonitor(model) as monitor, Gates(model) as gates:
        cross_entropy(model(x), labels).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True) if p.grad is not None)
    assert monitor.n_samples == gates.n_samples == 5
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(KeyError), gates:
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())
    cross_entropy(model(x), labels).backward()
    assert gates.n_samples == 5
    with gates:
        (cross_entropy(model(x), labels) / 2).backward()
    assert gates.n_samples == 10


def test_loss_scale_of_gates() -> None:
    model = net()
    x, labels = torch.randn(5, 2, 6, 6), torch.randint(4, (5,))
    with Gates(model) as plain:
        cross_entropy(model(x), labels).backward()
    with Gates(model, loss_scale=8.0) as scaled:
        (8 * cross_entropy(model(x), labels)).backward()
    torch.testing.assert_close(plain.fisher["0"], scaled.fisher["0"])


def test_what_gates_refuse() -> None:
    model = net()
    with pytest.raises(CoupledSamplesError, match=r"BatchNorm2d '1'.*eval"), Gates(model.train()):
        pass
    model.eval()
    with pytest.raises(LifecycleError, match="no sample"):
        _ = Gates(model).fisher
    with pytest.raises(LifecycleError, match="already"), Gates(model) as gates, gates:
        pass
    with pytest.raises(ArgumentError, match="no module of those"):
        Gates(nn.Tanh())
    with pytest.raises(ArgumentError, match="reduction"):
        Gates(model, reduction="none")
    with pytest.raises(ArgumentError, match="loss_scale"):
        Gates(model, loss_scale=0)
    with pytest.raises(ShapeError, match="without a batch axis"), Gates(model[0]):
        model[0](torch.randn(2, 6, 6))
    with pytest.raises(ShapeError, match="outside of a call of the monitored model"), Gates(model):
        model[0](torch.randn(5, 2, 6, 6))
    linear = nn.Linear(3, 2)
    linear.weight.requires_grad_(False)
    x = torch.randn(5, 3)
    with Gates(linear) as gates:
        outputs = linear(x).mul_(2)
        x.add_(1)
        with pytest.raises(CoverageError, match="changed in place"):
            torch.autograd.backward(outputs.sum(), inputs=[linear.bias])
    assert linear.bias.grad is not None, "gradients are complete"
    assert gates.n_samples == 0
    with pytest.raises(NonFiniteError, match="not finite"), Gates(linear):
        (linear(torch.randn(5, 3)).sum() * math.inf).backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gates_inside_of_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.on = False

        def block(self, x: Tensor) -> Tensor:
            return self.second(x).tanh()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).tanh()
            return self.head(checkpoint(self.block, x, use_reentrant=reentrant) if self.on else self.block(x))

    model = Checkpointed()
    x, labels = torch.randn(5, 4), torch.randint(3, (5,))
    found = []
    for model.on in (False, True):
        with Gates(model) as gates:
            cross_entropy(model(x), labels).backward()
        assert gates.n_samples == 5
        found.append(gates.fisher)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_saliency_of_weights_is_that_of_a_loop(reduction: str) -> None:
    model = net()
    x, labels = torch.randn(6, 2, 6, 6), torch.randint(4, (6,))
    with FisherMonitor(model, reduction, diagonal=True) as monitor:
        cross_entropy(model(x), labels, reduction=reduction).backward()
    found = weight_saliency(model, monitor, fisher="sampled")
    assert list(found) == ["0.weight", "3.weight", "6.weight", "8.weight"]
    expected = {name: torch.zeros_like(model.get_parameter(name)) for name in found}
    for n in range(6):
        loss = cross_entropy(model(x[n : n + 1]), labels[n : n + 1])
        for name, total in expected.items():
            weight = model.get_parameter(name)
            total += 0.5 * torch.autograd.grad(loss, weight, retain_graph=True)[0].square() * weight.detach() ** 2 / 6
    for name, total in expected.items():
        torch.testing.assert_close(found[name], total, rtol=1e-4, atol=1e-12)
    shrunk = weight_saliency(model, monitor, fisher="sampled", shrinkage=0.25)["6.weight"]
    square = model[6].weight.detach() ** 2
    f = 2 * expected["6.weight"] / square
    torch.testing.assert_close(shrunk, 0.5 * (0.75 * f + 0.25 * f.mean()) * square, rtol=1e-4, atol=1e-12)
    with pytest.raises(ArgumentError, match="shrinkage must be a share"):
        weight_saliency(model, monitor, fisher="sampled", shrinkage=2)
    everything = weight_saliency(model, monitor, fisher="sampled", parameters="all")
    assert list(everything) == [name for name, _ in model.named_parameters()]


def test_the_saliency_from_traces_and_its_warning() -> None:
    model = net()
    data = (torch.randn(6, 2, 6, 6), torch.randint(4, (6,)))
    report = fisher_report(model, None, data, fisher="exact", reduction="sum", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = weight_saliency(model, report)
    weight = model[6].weight.detach()
    torch.testing.assert_close(found["6.weight"], 0.5 * report.loc["6.weight", "fisher_mean"] / 6 * weight**2)
    with pytest.warns(UserWarning, match="no KL divergence"):
        weight_saliency(model, report, fisher="empirical")
    with pytest.raises(ArgumentError, match="another model"):
        weight_saliency(nn.Linear(3, 2), report)


def test_predicted_losses_of_pruning() -> None:
    scores = {"a": torch.tensor([[5.0, 1.0], [4.0, 2.0]]), "b": torch.tensor([0.5])}
    found = pruning_sensitivity(scores, (0, 0.25, 0.5, 1))
    assert found.loc["a"].tolist() == [4, 0, 1, 3, 12]
    assert found.loc["b"].tolist() == [1, 0, 0, 0, 0.5]
    order = {"a": torch.tensor([[0.0, 3.0], [1.0, 2.0]]), "b": torch.tensor([1.0])}
    assert pruning_sensitivity(scores, (0.5,), order=order).loc["a", 0.5] == 9
    with pytest.raises(ArgumentError, match="order must have"):
        pruning_sensitivity(scores, order={"a": torch.ones(3)})
    with pytest.raises(ArgumentError, match="from 0 to 1"):
        pruning_sensitivity(scores, (1.5,))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("amount", [0, 0.3, 0.5, 1])
def test_the_least_salient_weights_go(scope: str, amount: float) -> None:
    model = net()
    scores = {name: torch.rand(p.shape) for name, p in model.named_parameters() if p.dim() > 1}
    prune(model, scores, amount, scope=scope)
    zeros = {name: model.get_buffer(f"{name}_mask") == 0 for name in scores}
    groups = [list(scores)] if scope == "global" else [[name] for name in scores]
    for names in groups:
        flat, gone = (torch.cat([x[name].flatten() for name in names]) for x in (scores, zeros))
        assert int(gone.sum()) == round(amount * len(flat))
        if 0 < amount < 1:
            assert flat[gone].max() <= flat[~gone].min()
    for name in scores:
        owner, _, local = name.rpartition(".")
        assert (getattr(model.get_submodule(owner), local)[zeros[name]] == 0).all()


def test_masks_are_pytorchs_own() -> None:
    model = net()
    x = torch.randn(3, 2, 6, 6)
    names = ["0.weight", "3.weight", "6.weight", "8.weight"]
    prune(model, {name: model.get_parameter(name).abs() for name in names}, 0.5)
    assert torch_prune.is_pruned(model)
    reference = net()
    reference.load_state_dict({k.removesuffix("_orig"): v for k, v in model.state_dict().items() if "_mask" not in k})
    torch_prune.global_unstructured(
        [(reference[i], "weight") for i in (0, 3, 6, 8)], torch_prune.L1Unstructured, amount=0.5
    )
    assert all(torch.equal(model[i].weight_mask, reference[i].weight_mask) for i in (0, 3, 6, 8))
    torch.testing.assert_close(model(x), reference(x))
    with FisherMonitor(model, diagonal=True) as monitor:
        cross_entropy(model(x), torch.tensor([0, 1, 2])).backward()
    saliency = weight_saliency(model, monitor, fisher="sampled")
    assert "6.weight_orig" in saliency
    was = model[6].weight_mask.clone()
    prune(model, {"6.weight_orig": saliency["6.weight_orig"]}, 0.75)
    assert int((model[6].weight_mask == 0).sum()) == round(0.75 * was.numel())
    assert (model[6].weight_mask <= was).all(), "what is gone stays gone"
    after = model(x)
    for i in (0, 3, 6, 8):
        torch_prune.remove(model[i], "weight")
    assert not torch_prune.is_pruned(model)
    torch.testing.assert_close(model(x), after)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_channels_go_with_their_bias(scope: str) -> None:
    model = net()
    scores = {"0": torch.tensor([3.0, 1.0, 4.0, 2.0]), "3": torch.tensor([0.5, 6.0, 7.0])}
    prune(model, scores, 3 / 7 if scope == "global" else 0.5, scope=scope)
    gone = {"global": {"0": [1, 3], "3": [0]}, "layer": {"0": [1, 3], "3": [0, 2][:2]}}[scope]
    if scope == "layer":
        gone["3"] = [0, 1]  # round(1.5) is 2
    x = torch.randn(2, 2, 6, 6)
    assert (model[0](x)[:, gone["0"]] == 0).all()
    hidden = model[3](torch.randn(2, 4, 4, 4))
    assert (hidden[:, gone["3"]] == 0).all()
    kept = [k for k in range(3) if k not in gone["3"]]
    assert (hidden[:, kept] != 0).any()
    torch_prune.remove(model[0], "weight")
    torch_prune.remove(model[0], "bias")
    assert (model[0](x)[:, gone["0"]] == 0).all()


def test_a_layer_keeps_a_channel() -> None:
    model = net()
    scores = {"0": torch.zeros(4), "3": torch.ones(3)}
    prune(model, scores, 0.9)
    assert int(model[0].bias_mask.sum()) == 1
    assert int(model[3].bias_mask.sum()) == 1
    other = net()
    prune(other, scores, 1.0, scope="layer", minimum=2)
    assert int(other[0].bias_mask.sum()) == 2


@pytest.mark.parametrize("amount", [-0.1, 1.1, math.nan, True, "0.5", None])
def test_amounts_that_mean_nothing(amount: Any) -> None:
    model = net()
    with pytest.raises(ArgumentError, match="from 0 to 1"):
        prune(model, {"6.weight": model[6].weight.detach().abs()}, amount)


def test_saliencies_that_do_not_fit() -> None:
    model = net()
    good = {"6.weight": model[6].weight.detach().abs()}
    for bad, message in [
        ({"9.weight": torch.ones(3)}, "another model: Sequential has no parameter or layer '9.weight'"),
        ({"8.weight": torch.ones(3)}, r"8.weight has shape \(3,\), but \(4, 6\)"),
        ({"8.weight": torch.full((4, 6), math.nan)}, "NaN"),
        ({"8": torch.ones(4)}, "can't be compared"),
        ({"8": torch.ones(5)}, r"\(5,\), but \(4,\)"),
        ({"2": torch.ones(4)}, "no parameter or layer '2'"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            prune(model, good | bad, 0.5)
    for nothing in ({}, [1]):
        with pytest.raises(ArgumentError, match="must be a mapping with an entry for each layer or weight"):
            prune(model, nothing, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="minimum"):
        prune(model, {"6": torch.ones(6)}, 0.5, minimum=-1)
    with pytest.raises(ArgumentError, match="scope"):
        prune(model, good, 0.5, scope="all")
    assert not torch_prune.is_pruned(model), "nothing was pruned"


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_the_largest_entries_are_taken(share: float) -> None:
    scores = {"a": torch.rand(4, 5), "b": torch.rand(7), "c.bias": torch.rand(3), "d": torch.rand(())}
    found = top_k_mask(scores, share, always="*.bias")
    assert {name: mask.shape for name, mask in found.items()} == {name: value.shape for name, value in scores.items()}
    assert found["c.bias"].all()
    flat, taken = (torch.cat([x[name].flatten() for name in ("a", "b", "d")]) for x in (scores, found))
    assert int(taken.sum()) == round(share * 28)
    if 0 < share < 1:
        assert flat[taken].min() > flat[~taken].max()


def test_masks_of_the_largest_have_as_many_as_asked_for_among_equals() -> None:
    found = top_k_mask({"a": torch.zeros(10)}, 0.3)
    assert int(found["a"].sum()) == 3
    assert top_k_mask({"a": torch.zeros(2)}, 0, always=["a"])["a"].all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({"a": torch.ones(2)}, 1.5), "share must be a share from 0 to 1"),
        (([torch.ones(2)], 0.5), "mapping from names to tensors"),
        (({"a": torch.tensor([1.0, math.nan])}, 0.5), "the diagonal of a has NaN"),
    ],
)
def test_masks_of_nonsense(arguments: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        top_k_mask(*arguments)
    with pytest.raises(ArgumentError, match=r"no name matches 'b\.\*'"):
        top_k_mask({"a": torch.ones(2)}, 0.5, always=("a", "b.*"))


class Residual(nn.Module):
    """Two convolutions into one stream, and a depthwise one behind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block, self.block_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        x = x + self.block_norm(self.block(x))
        return self.head(self.depthwise(x).relu().mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gates", "norms", "weights"])
def test_torch_pruning_prunes_by_our_importance(kind: str) -> None:
    tp = pytest.importorskip("torch_pruning")
    model = Residual().eval()
    x, labels = torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
    modules = (nn.BatchNorm2d,) if kind == "norms" else None
    with FisherMonitor(model, diagonal=True) as monitor, Gates(model, modules=modules, fisher="sampled") as gates:
        cross_entropy(model(x), labels).backward()
    weights = weight_saliency(model, monitor, fisher="sampled")
    importance = GroupImportance(model, weights if kind == "weights" else gates.saliency)
    seen = []

    def spied(group: Any) -> Tensor:
        seen.append(importance(group))
        return seen[-1]

    if kind == "gates":
        expected = gates.saliency["stem"] + gates.saliency["block"] + gates.saliency["depthwise"]
    elif kind == "norms":
        expected = gates.saliency["stem_norm"] + gates.saliency["block_norm"]
    else:
        w = {name: s.double() for name, s in weights.items()}
        expected = w["stem.weight"].sum((1, 2, 3)) + w["block.weight"].sum((1, 2, 3)) + w["block.weight"].sum((0, 2, 3))
        expected = expected + w["depthwise.weight"].sum((1, 2, 3)) + w["head.weight"].sum(0)
    keep = expected.argsort(descending=True)[:4].sort().values
    stem = model.stem.weight.detach().clone()
    pruner = tp.pruner.BasePruner(model, x, importance=spied, pruning_ratio=0.5, ignored_layers=[model.head])
    pruner.step()
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-12)
    assert model.head.in_features == model.depthwise.groups == 4
    assert torch.equal(model.stem.weight, stem[keep])
    assert model(x).shape == (6, 5)


def test_importances_that_do_not_fit() -> None:
    with pytest.raises(ArgumentError, match="another model"):
        GroupImportance(Residual(), {"other": torch.ones(8)})
    with pytest.raises(ArgumentError, match="another model"):
        GroupImportance(Residual(), {"stem.weight": torch.ones(8)})


def test_a_model_in_the_place_of_saliencies() -> None:
    model = nn.Linear(4, 3)
    with FisherMonitor(model, fisher="sampled", diagonal=True) as monitor:
        model(torch.randn(5, 4)).square().sum(1).mean().backward()
    with pytest.raises(ArgumentError, match=r"not a Linear: pruning_sensitivity\(weight_saliency\(model, monitor\)\)"):
        pruning_sensitivity(model, monitor)  # type: ignore[arg-type]
    assert list(pruning_sensitivity(weight_saliency(model, monitor)).index) == ["weight"]


def test_a_forgotten_diagonal_is_told() -> None:
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    options: dict[str, Any] = {"fisher": "exact", "progress": False}
    traces = fisher_results(model, None, (x, None), **options)
    with pytest.warns(UserWarning, match="keeps no diagonal.*pass diagonal=True.*or shrinkage=1"):
        found = weight_saliency(model, traces)
    whole = fisher_results(model, None, (x, None), diagonal=True, **options)
    for silent in (
        weight_saliency(model, traces, shrinkage=1),
        weight_saliency(model, traces.report()),
        weight_saliency(model, whole, shrinkage=1),
    ):
        torch.testing.assert_close(silent["weight"], found["weight"])
    expected = 0.5 * whole.diagonal["weight"] * model.weight.double() ** 2
    torch.testing.assert_close(weight_saliency(model, whole)["weight"].double(), expected.detach().double())


class Held(nn.Module):
    """Weights that the model reads from modules that it does not call, and a weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2)])
        self.held = nn.ModuleList([nn.ParameterList([torch.randn(8, 8)])])
        self.named = nn.ParameterDict({"mix": torch.randn(8, 8)})
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder:
            x = layer(x)
        x = (x @ self.held[0][0]).tanh() @ self.named["mix"]
        return self.last(self.second(self.first(x).tanh()).mean(1))


def trained(model: nn.Module, x: Tensor, y: Tensor, after: Any = None) -> list[float]:
    """The losses of three steps."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if after is not None:
            after()
    return losses


def test_every_use_of_a_pruned_weight_is_pruned_through_training() -> None:
    """Against a copy whose weights are multiplied by the masks after each step, bit for bit, also when the masks are removed."""
    model, x, y = Held(), torch.randn(4, 5, 8), torch.randint(3, (4,))
    reference = copy.deepcopy(model)
    weights = {name: p for name, p in reference.named_parameters() if p.dim() > 1}
    masks = {name: (torch.rand_like(p) > 0.4).float() for name, p in weights.items()}

    def masked() -> None:
        with torch.no_grad():
            for name, p in weights.items():
                p.mul_(masks[name])

    for name, mask in masks.items():
        prune(model, {name: mask}, float(1 - mask.mean()))
    masked()
    assert trained(model, x, y) == trained(reference, x, y, masked)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), reference.eval()(x))
    for name in masks:
        owner, _, local = name.rpartition(".")
        torch_prune.remove(model.get_submodule(owner), local)
    torch_prune.remove(model.second, "weight")
    assert model.first.weight is model.second.weight
    assert torch.equal(model(x), reference(x))


def test_a_tied_weight_is_pruned_again_in_both_modules() -> None:
    model = Held()
    prune(model, {"first.weight": model.first.weight.detach().abs()}, 0.25)
    prune(model, {"first.weight_orig": model.first.weight_orig.detach().abs()}, 0.5)
    for layer in (model.first, model.second):
        assert int((layer.weight == 0).sum()) == 32


def test_saliencies_of_integers_prune_as_numbers_do_and_others_are_refused() -> None:
    model = nn.Linear(3, 4)
    for amount in (0.25, 0.5):
        local = "weight" if amount == 0.25 else "weight_orig"
        prune(model, {local: torch.arange(12).view(4, 3)}, amount)
        assert model.weight_mask.flatten().tolist() == [float(i >= 12 * amount) for i in range(12)]
    with pytest.raises(ArgumentError, match="saliency of weight must be a tensor"):
        prune(nn.Linear(3, 4), {"weight": [[1.0]]}, 0.5)  # type: ignore[dict-item]


def test_one_amount_is_any_number_and_nan_is_refused() -> None:
    saliency = {"weight": torch.tensor([[3.0, 1.0], [2.0, 4.0]])}
    for amount, expected in ((1, 10.0), (0, 0.0), (numpy.float32(0.5), 3.0), (numpy.float64(0.25), 1.0)):
        assert pruning_sensitivity(saliency, amount).iloc[0, 1] == expected
    with pytest.raises(ArgumentError, match="saliency of weight has NaN"):
        pruning_sensitivity({"weight": torch.tensor([1.0, math.nan])}, 0.5)
