"""Frozen models, and leaves that are born inside of a forward, against a loop over samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from oracles import assert_equal, per_sample_squared_norms, total, trace
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.LSTM(4, 5, 2, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x)[0][:, -1])


class Attending(nn.Module):
    """With raw parameters, as a vision transformer has its class token and ConvNeXt its layer scales."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.rand(4))
        self.layers, self.last = nn.TransformerEncoder(layer, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.last(self.layers(x)[:, 0] * self.scale)


def dispatched() -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    for module in model:  # what a device map does: each forward is replaced by one that moves its inputs
        hook = accelerate.hooks.AlignDevicesHook(execution_device=torch.get_default_device())
        accelerate.hooks.add_hook_to_module(module, hook)
    return model


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("build", [Recurrent, Attending, dispatched])
def test_a_frozen_model_has_a_row_for_every_parameter(build: Callable[[], nn.Module], verify: bool) -> None:
    model, x, y = build().double(), torch.randn(4, 6, 4, dtype=torch.float64), torch.randint(3, (4,))
    expected = trace(per_sample_squared_norms(model, cross_entropy, x, y, parameters="all"))
    model.requires_grad_(False)
    report = fisher_report(model, cross_entropy, (x, y), parameters="all", progress=False, verify=verify)
    assert list(report.index) == list(expected)
    for name, value in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), torch.float64)
    assert not any(p.requires_grad for p in model.parameters())


def require_gradient(module: nn.Module, args: object, output: Tensor) -> None:
    output.requires_grad_(True)


class Adapted(nn.Module):
    """A frozen layer with a low-rank addition, behind a frozen embedding whose output is made to require a gradient."""

    def __init__(self, checkpointed: bool, beside: bool = False) -> None:
        super().__init__()
        self.embedding, self.frozen = nn.Embedding(7, 5), nn.Linear(5, 5)
        self.down, self.up, self.last = nn.Linear(5, 2, bias=False), nn.Linear(2, 5, bias=False), nn.Linear(5, 3)
        self.beside = nn.Embedding(7, 3) if beside else None
        self.checkpointed = checkpointed
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in ("down", "up", "beside"))
        self.embedding.register_forward_hook(require_gradient)

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.frozen(x) + self.up(self.down(x)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        x = self.last(x.mean(1))
        return x if self.beside is None else x + self.beside(ids).mean(1)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("parameters", ["trainable", "all"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_leaves_born_inside_the_forward(checkpointed: bool, beside: bool, parameters: str, verify: bool) -> None:
    """As enable_input_require_grads() makes them. With another way to the loss, what lies behind one was lost silently."""
    model = Adapted(checkpointed, beside).double()
    ids, y = torch.randint(7, (4, 6)), torch.randint(3, (4,))
    loss: Any = cross_entropy
    expected = trace(per_sample_squared_norms(model, loss, ids, y, parameters=parameters))
    report = fisher_report(model, loss, (ids, y), parameters=parameters, progress=False, verify=verify)
    with FisherMonitor(model, parameters=parameters) as monitor:
        loss(model(ids), y).backward()
    for found in (report, monitor.report()):
        assert list(found.index) == list(expected)
        for name, value in expected.items():
            assert_equal(torch.tensor(found.loc[name, "fisher_trace"]), value, total(expected), torch.float64)


def test_nothing_before_the_models_inputs_is_differentiated() -> None:
    """Leaves behind the inputs are somebody else's, whose graph is still there afterwards."""
    model, before = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), nn.Linear(4, 4).double()
    seen: list[Tensor] = []
    x = before(torch.randn(6, 4, dtype=torch.float64)).exp()
    x.grad_fn.register_hook(lambda *grads: seen.append(grads))  # type: ignore[union-attr,arg-type]
    y = torch.randint(3, (6,))
    report = fisher_report(model, cross_entropy, (x, y), progress=False)
    assert not seen
    expected = trace(per_sample_squared_norms(model, cross_entropy, x.detach(), y))
    assert_equal(torch.tensor(report.fisher_trace["0.weight"]), expected["0.weight"], total(expected), torch.float64)
    x.sum().backward()
    assert seen


class AskingForAGradient(nn.Module):
    """What comes after the first layer has a gradient only if the first layer's output has one."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.spare, self.checkpointed = nn.Linear(5, 3), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.checkpointed:
            return self.last(checkpoint(lambda h: self.inner(h).tanh(), h, use_reentrant=True))
        inner = self.inner(h).tanh()
        return self.last(inner if h.requires_grad else inner.detach())


@pytest.mark.parametrize("parameters", [["inner.*", "last.bias"], ["inner.weight"], ["*.bias"]], ids=str)
def test_freezing_what_is_not_chosen_takes_no_gradient_from_what_is(parameters: list[str]) -> None:
    model, x, y = AskingForAGradient(False).double(), torch.randn(6, 4).double(), torch.randint(3, (6,))
    expected = per_sample_squared_norms(model, cross_entropy, x, y)
    everything = total(trace(expected))
    for fisher, verify in (("empirical", True), ("empirical", False), ("observed", True), ("observed", False)):
        loss = cross_entropy if fisher == "empirical" else None
        # The second batch's graph is of a kind that was seen.
        data = [(x[:4], y[:4]), (x[4:], y[4:])]
        report = fisher_report(model, loss, data, fisher=fisher, parameters=parameters, verify=verify, progress=False)  # type: ignore[arg-type]
        for name, found in report["fisher_trace"].items():
            found = torch.tensor(found, dtype=torch.float64)
            assert_equal(found, expected[str(name)].mean(), everything, torch.float64)
    found = empirical_fisher_trace(model, cross_entropy, x, y, parameters=parameters)
    assert_equal(found, sum(expected[name].mean() for name in report.index), everything, torch.float64)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("parameters", [["inner.*", "last.bias"], ["inner.weight"], ["*.bias"]], ids=str)
def test_freezing_what_is_not_chosen_hides_no_reentrant_checkpoint(parameters: list[str]) -> None:
    model, x, y = AskingForAGradient(True), torch.randn(6, 4), torch.randint(3, (6,))
    plain = AskingForAGradient(False)
    plain.load_state_dict(model.state_dict())
    norms = per_sample_squared_norms(plain, cross_entropy, x, y)
    report = fisher_report(model, cross_entropy, (x, y), parameters=parameters, progress=False)
    everything = sum(norms[name].mean() for name in report.index)
    for name in report.index:
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), norms[name].mean(), everything, torch.float32)
    found = empirical_fisher_trace(model, cross_entropy, x, y, parameters=parameters)
    assert_equal(found.double(), everything, everything, torch.float32)


def test_what_no_freezing_cuts_off_is_run_once_again_only() -> None:
    model, x, y, calls = AskingForAGradient(False), torch.randn(6, 4), torch.randint(3, (6,)), []
    model.register_forward_hook(lambda *_: calls.append(1))
    chosen = {"parameters": ["last.*", "spare.*"], "verify": False, "progress": False}
    fisher_report(model, cross_entropy, [(x, y)] * 5, **chosen)  # type: ignore[arg-type]
    assert len(calls) == 6
