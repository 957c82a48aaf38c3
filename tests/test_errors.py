"""Bad input: a refusal that derives from CurvatureError, names what is wrong, and says what to do."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_state import hooks
from torch_secorder import FisherMonitor, empirical_fisher_trace, generalized_fisher_trace, hessian_trace
from torch_secorder.errors import CoverageError, CurvatureError


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def run(model: nn.Module, x: Tensor, **options: Any) -> FisherMonitor:
    """One monitored pass; the hooks are gone whatever happens."""
    before = hooks(model)
    try:
        with FisherMonitor(model, **options) as monitor:
            model(x).square().mean().backward()
    finally:
        assert hooks(model) == before
    return monitor


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "average"}, r"reduction.*average|average.*reduction"),
        ({"reduction": "none"}, r"reduction"),
        ({"reduction": None}, r"reduction"),
        ({"parameters": "frozen"}, r"parameters.*frozen|frozen.*parameters"),
        ({"nonfinite": "ignore"}, r"nonfinite.*ignore|ignore.*nonfinite"),
        ({"repeated_calls": "twice"}, r"repeated_calls.*twice|twice.*repeated_calls"),
        ({"loss_scale": 0}, r"loss_scale"),
        ({"loss_scale": float("nan")}, r"loss_scale"),
        ({"loss_scale": "half"}, r"loss_scale"),
    ],
    ids=str,
)
def test_arguments_of_the_monitor(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CurvatureError, match=message) as raised:
        run(classifier(), torch.randn(5, 4), **options)
    assert isinstance(raised.value, ValueError)


def test_a_loss_scale_of_zero_read_at_backward() -> None:
    with pytest.raises(CurvatureError, match=r"loss_scale"):
        run(classifier(), torch.randn(5, 4), loss_scale=lambda: 0.0)


def test_a_model_is_a_module() -> None:
    with pytest.raises((CurvatureError, TypeError), match=r"(?i)module"):
        FisherMonitor(lambda x: x)


@pytest.mark.parametrize("model", [lambda: classifier().requires_grad_(False)], ids=["frozen"])
def test_no_trainable_parameter_names_the_remedy(model: Any) -> None:
    with pytest.raises(CurvatureError, match=r'parameters="all"'):
        run(model(), torch.randn(5, 4))
    with pytest.raises(CurvatureError, match=r"trainable"):
        empirical_fisher_trace(model(), nn.CrossEntropyLoss(), torch.randn(5, 4), torch.randint(3, (5,)))


def test_no_parameter_at_all() -> None:
    with pytest.raises(CurvatureError, match=r"(?i)parameter"):
        run(nn.Sequential(nn.Tanh()), torch.randn(5, 4))


# Batches


def test_an_empty_batch() -> None:
    with pytest.raises(CurvatureError, match=r"(?i)empty"):
        empirical_fisher_trace(classifier(), nn.CrossEntropyLoss(), torch.randn(0, 4), torch.randint(3, (0,)))
    model = classifier()
    with pytest.raises(CurvatureError, match=r"(?i)empty"):
        generalized_fisher_trace(model, model(torch.randn(0, 4)), None)
    with pytest.raises(CurvatureError, match=r"empty: it has 0 samples \(axis 0 of input 0, shape \(0, 4\)\)"):
        hessian_trace(model, nn.MSELoss(), torch.randn(0, 4), torch.randn(0, 3))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.one(x).sum(0) + self.two(y).sum(0)


def test_inputs_of_mismatched_batch_sizes() -> None:
    model = TwoInputs()
    with pytest.raises(CurvatureError, match=r"\b5 samples"), FisherMonitor(model):
        model(torch.randn(5, 4), torch.randn(3, 4)).sum().backward()
    with pytest.raises(CurvatureError, match=r"\b5 samples"):
        empirical_fisher_trace(model, nn.MSELoss(), (torch.randn(5, 4), torch.randn(3, 4)), torch.randn(5, 3))


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=str)
def test_targets_of_another_batch_size(loss_fn: nn.Module) -> None:
    targets = torch.randint(3, (1,)) if isinstance(loss_fn, nn.CrossEntropyLoss) else torch.randn(1, 3)
    with pytest.raises(CurvatureError, match=r"(?s)5.*1|1.*5"):
        empirical_fisher_trace(classifier(), loss_fn, torch.randn(5, 4), targets)
    with pytest.raises(CurvatureError, match=r"(?s)5.*7|7.*5"):
        empirical_fisher_trace(classifier(), loss_fn, torch.randn(5, 4), targets.repeat_interleave(7, 0))


def test_targets_of_another_batch_size_for_observed_labels() -> None:
    model = classifier()
    with pytest.raises(CurvatureError, match=r"(?s)5.*4|4.*5"):
        generalized_fisher_trace(model, model(torch.randn(5, 4)), torch.randint(3, (4,)), labels="observed")
    with pytest.raises(CurvatureError, match=r"(?s)5.*4|4.*5"):
        generalized_fisher_trace(model, model(torch.randn(5, 4)), torch.randint(3, (4,)))


# Losses


def test_a_loss_that_is_not_a_scalar() -> None:
    with pytest.raises(CurvatureError, match=r"(?i)scalar"):
        empirical_fisher_trace(
            classifier(), nn.CrossEntropyLoss(reduction="none"), torch.randn(5, 4), torch.randint(3, (5,))
        )


def test_a_loss_that_does_not_depend_on_the_model() -> None:
    with pytest.raises(CurvatureError, match=r"(?i)loss"):
        empirical_fisher_trace(
            classifier(), lambda outputs, targets: targets.square().mean(), torch.randn(5, 4), torch.randn(5, 3)
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(value: float) -> None:
    with pytest.raises(CurvatureError, match=r"0\.weight"):
        empirical_fisher_trace(classifier(), nn.MSELoss(), torch.full((5, 4), value), torch.randn(5, 3))


# Layers


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Exotic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(x.unsqueeze(-1) * self.kernel).sum(-1)


def test_unsupported_layers_are_all_named_in_one_error() -> None:
    """Frozen, that is: a parameter that requires a gradient can be found in the graph, whatever its module does."""
    model = nn.Sequential(Raw(), nn.Linear(4, 4), nn.Sequential(Exotic(), Raw())).requires_grad_(False)
    model[2][1].requires_grad_(True)
    with pytest.raises(CurvatureError) as raised:
        FisherMonitor(model, parameters="all")
    message = str(raised.value)
    for words in ("Raw '0' (factor)", "Exotic '2.0' (kernel)", "register_rule", "require a gradient"):
        assert words in message
    assert "Linear" not in message
    assert "2.1" not in message
    assert isinstance(raised.value, NotImplementedError)


def test_an_unsupported_layer_without_analyzed_parameters_is_in_nobodys_way() -> None:
    model = nn.Sequential(Raw().requires_grad_(False), nn.Linear(4, 3))
    monitor = run(model, torch.randn(5, 4))
    assert list(monitor.report().index) == ["1.weight", "1.bias"]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_batch_norm_in_training_mode(affine: bool, trainable: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=affine), nn.Linear(4, 3)).train()
    model[1].requires_grad_(trainable)
    with pytest.raises(CurvatureError, match=r"(?s)BatchNorm1d.*eval|eval.*BatchNorm1d"):
        run(model, torch.randn(5, 4))
    run(model.eval(), torch.randn(5, 4))


def test_batch_norm_switched_to_training_inside_the_block() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    with FisherMonitor(model) as monitor:
        model(torch.randn(5, 4)).sum().backward()
        model.train()
        with pytest.raises(CurvatureError, match=r"BatchNorm1d"):
            model(torch.randn(5, 4))
        model.eval()
        model(torch.randn(5, 4)).sum().backward()
    assert monitor.n_samples == 10


def test_batch_norm_without_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(CurvatureError, match=r"(?s)BatchNorm1d.*running"):
        run(model, torch.randn(5, 4))


def test_scale_grad_by_freq() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Linear(4, 3))
    with pytest.raises(CurvatureError, match=r"scale_grad_by_freq") as raised:
        run(model, torch.randint(5, (4, 6)))
    assert isinstance(raised.value, NotImplementedError)
    assert "0" in str(raised.value)


class Odd(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).square()


def with_another_forward() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = MethodType(lambda self, x: F.linear(x, self.weight.flip(0), self.bias), layer)  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (with_another_forward, r"Linear '1' \(weight, bias\).*forward"),
        (lambda: Odd(4, 4), r"Odd '1' \(weight, bias\).*forward"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), r"'1.*(original0|weight).*"),
    ],
    ids=["replaced forward", "subclass", "parametrized"],
)
def test_a_layer_that_its_class_s_rule_does_not_fit(layer: Any, message: str) -> None:
    """With gradients it is exact, by the graph (see the awkward problems); frozen, nothing shows how it is used."""
    model = nn.Sequential(nn.Linear(4, 4), layer())
    run(model, torch.randn(5, 4), parameters="all")
    model[1].requires_grad_(False)
    run(model, torch.randn(5, 4))
    with pytest.raises(CurvatureError, match=message) as raised:
        run(model, torch.randn(5, 4), parameters="all")
    assert isinstance(raised.value, NotImplementedError)


def test_parameters_swapped_during_a_functional_call() -> None:
    """Theirs are the gradients, and not the model's."""
    model = classifier()
    values = {name: (2 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    with FisherMonitor(model) as monitor:
        torch.func.functional_call(model, values, torch.randn(5, 4)).sum().backward()
    assert all(value.grad is not None for value in values.values())
    assert monitor.n_samples == 0
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(CoverageError, match="'weight' was replaced"), FisherMonitor(model, parameters="all"):
        torch.func.functional_call(model, values, torch.randn(5, 4))


def test_errors_are_also_of_the_kinds_that_python_has() -> None:
    with pytest.raises(ValueError, match="reduction"):
        FisherMonitor(classifier(), reduction="average")
    with pytest.raises(NotImplementedError, match="hinge"):
        model = classifier()
        generalized_fisher_trace(model, model(torch.randn(5, 4)), None, loss_type="hinge")
