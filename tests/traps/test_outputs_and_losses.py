"""Traps 6, 7, 8 and 10: outputs of every kind, coupled samples, frozen parts, settings that formulas forget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expectations import expectation
from oracles import assert_equal, per_sample_squared_norms, total, trace
from problems._base import Forward, randomized
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report
from torch_secorder.batch_axis.knowledge import is_due
from torch_secorder.errors import CoupledSamplesError, CurvatureError, VerificationError
from traps.exactness import assert_exact, drawn, numbers, of_one_graph

# 6. In-place operations, outputs of every kind, keywords


def test_trap_06_in_place_after_views_and_outputs_of_every_kind() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, *, values: Tensor) -> dict[str, Any]:
            h = self.one(input=values).mul_(2)
            h[..., 0].add_(1)
            return {"pair": (self.two(h), h), "text": "two"}

    def forward(m: Any, x: Tensor) -> Tensor:
        one, two = m.both(values=x)["pair"]
        one += two
        return m.last(one.clamp_(-3, 3))

    assert_exact(*drawn(Forward(forward, both=Both(), last=nn.Linear(4, 2)), 5, 3, 4))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].mul_(-3)  # which a sum gave to others too


class Adversarial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        adverse = Reversed.apply(self.second(x).tanh())
        return adverse + self.first(x)


def test_trap_06_a_gradient_that_is_changed_in_place_while_it_waits() -> None:
    """Passes that are checked take each gradient at once, and are right; others put small calls together, and refuse.

    After a refusal the passes are counted anew, so that those that come next are checked.
    """
    model, x, y = drawn(Adversarial(), 4, 6)
    expected = []
    for n in range(4):
        model.zero_grad()
        numbers(model(x[n : n + 1]), y[n : n + 1]).backward()
        expected.append([float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None])
    with FisherMonitor(model, per_sample=True) as monitor:
        for number in (1, 2, 3, 4, 1, 2, 3, 4):
            refusal = "" if is_due(number) else r"'first': the gradient of its output was changed in place"
            loss = numbers(model(x), y)
            with expectation(refusal):
                loss.backward()
    assert monitor.n_samples == 6 * 4
    found = torch.tensor(monitor.per_sample.to_numpy())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).repeat(6, 1))


# 7. Coupled samples


@pytest.mark.parametrize("affine", [True, False])
def test_trap_07_batch_statistics_are_refused(affine: bool) -> None:
    model, x, y = drawn(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=affine), nn.Linear(4, 2)).eval(), 5, 4)
    assert_exact(model, x, y)
    model.train()
    with pytest.raises(CoupledSamplesError, match=r"BatchNorm1d '1'.*eval"), FisherMonitor(model):
        model(x)
    with pytest.raises(CoupledSamplesError, match=r"BatchNorm1d '1'.*eval"):
        fisher_report(model, numbers, (x, y), progress=False)


def test_trap_07_a_loss_that_compares_samples_is_refused() -> None:
    model, x, y = drawn(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), 5, 4)

    def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))

    with pytest.raises(CurvatureError, match=r"(?i)samples"):
        fisher_report(model, contrastive, (x, y), progress=False)


# 8. Frozen parts, and losses that reach only some outputs


MIXTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "the nodes of a graph": lambda h: (
        torch.rand(len(h), len(h), generator=torch.Generator().manual_seed(0), device="cpu").to(h) @ h
    ),
    "a convolution along the batch": lambda h: (
        F.conv1d(h.T[:, None], h.new_tensor([[[0.2, 0.5, 0.3]]]), padding=1)[:, 0].T
    ),
    "attention over the batch": lambda h: (h @ h.T).softmax(1) @ h,
    "neighbors": lambda h: h + h.roll(1, 0),
    "a mean of its own": lambda h: h - h.mean(0),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_trap_07_a_model_that_mixes_samples(name: str) -> None:
    """A monitor gives the gradients of the rows' losses, and what compares a sample alone refuses."""
    layers = {"first": nn.Linear(4, 5), "last": nn.Linear(5, 3)}
    model, x, y = drawn(Forward(lambda m, x: m.last(MIXTURES[name](m.first(x)).tanh()), **layers), 6, 4)
    expected = of_one_graph(model, (model(x) - y).square().sum(1))
    everything = total(trace(expected))
    with FisherMonitor(model, per_sample=True) as monitor:
        outputs = model(x)
        loss = numbers(outputs, y)
        monitor.verify(loss)
        loss.backward()
    unchecked = fisher_report(model, numbers, (x, y), verify=False, progress=False)
    for row, t in expected.items():
        assert_equal(torch.tensor(monitor.per_sample[row].to_numpy()), t, len(t) * everything, torch.float64)
        assert_equal(torch.tensor(unchecked.fisher_trace[row]), t.mean(), everything, torch.float64)
    with pytest.raises(VerificationError):
        fisher_report(model, numbers, (x, y), progress=False)
    with pytest.raises(VerificationError):
        empirical_fisher_trace(model, numbers, x, y)


def test_trap_08_partly_frozen_and_partly_reached() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.one(x).tanh()
        m.unreached(h)
        return m.two(h)[:, :1]

    model = Forward(forward, one=nn.Linear(4, 4), two=nn.Linear(4, 3), unreached=nn.Linear(4, 2))
    model, x, y = drawn(model, 5, 4)
    model.one.weight.requires_grad_(False)
    monitor = assert_exact(model, x, y)
    assert list(monitor.report().index) == ["one.bias", "two.weight", "two.bias", "unreached.weight", "unreached.bias"]
    assert list(monitor.report()["rule"] == "unused") == [False, False, False, True, True]


@pytest.mark.parametrize("verify", [True, False])
def test_trap_08_a_leaf_that_the_model_makes_and_that_requires_a_gradient(verify: bool) -> None:
    """As kernels do that write into a tensor of zeros: a layer behind it has an input with a gradient, and starts no graph."""

    def forward(m: Any, x: Tensor) -> Tensor:
        made = torch.zeros(len(x), 4, dtype=x.dtype, requires_grad=True)
        return m.both(m.one(x) + m.two(made)).tanh()

    model = Forward(forward, one=nn.Linear(4, 4), two=nn.Linear(4, 4), both=nn.Linear(4, 3))
    model, x, y = drawn(model, 5, 4)
    expected = per_sample_squared_norms(model, numbers, x, y)
    for inputs in (x, x.clone().requires_grad_(), x.clone().requires_grad_().neg().neg()):
        assert_exact(model, inputs, y, report=False)
        table = fisher_report(model, numbers, (inputs, y), progress=False, verify=verify)
        for name, t in expected.items():
            assert_equal(torch.tensor(table.loc[name, "fisher_trace"]), t.mean(), total(trace(expected)), torch.float64)
        found = empirical_fisher_trace(model, numbers, inputs, y)
        assert_equal(found, total(trace(expected)), total(trace(expected)), torch.float64)


def test_trap_19_the_same_tensor_twice_among_the_outputs_and_two_outputs_of_one_node() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        h = m.one(x).tanh() @ m.weight.weight
        last = m.two(h)
        return last, h, last, *last.chunk(2, 1)

    model = Forward(forward, one=nn.Linear(4, 4), two=nn.Linear(4, 6), weight=nn.Linear(4, 4))
    model, x = randomized(model).double(), torch.randn(5, 4).double()
    assert_exact(
        model, x, torch.randn(5, 6).double(), lambda outputs, targets: numbers(outputs[2] + outputs[0], targets)
    )


# 10. Settings that a formula forgets


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_trap_10_settings_that_formulas_forget() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.embedding((x[:, 0, 0, :2] * 3).long().abs() % 5).sum(1)
        h = m.circular(x + h[:, :, None, None]).tanh()
        h = m.norm(m.transposed(m.even(m.depthwise(h))))
        return m.head(h.flatten(2).transpose(1, 2))

    model = Forward(
        forward,
        embedding=nn.Embedding(5, 2, padding_idx=0),
        circular=nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", bias=False),
        depthwise=nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=4, padding_mode="reflect"),
        even=nn.Conv2d(8, 4, 2, padding="same", groups=2),
        transposed=nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, padding=1, groups=2),
        norm=nn.BatchNorm2d(6, eps=0.1),
        head=nn.Linear(6, 3, bias=False),
    ).eval()
    assert_exact(*drawn(model, 4, 2, 6, 6))


@pytest.mark.parametrize("options", [{"ignore_index": 1}, {"weight": torch.tensor([0.3, 1.0, 2.0])}], ids=str)
def test_trap_10_normalizers_that_are_not_the_number_of_samples(options: dict[str, Any]) -> None:
    model, x, _ = drawn(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), 7, 4)
    y = torch.tensor([0, 1, 2, 1, 0, 2, 2])
    loss_fn = nn.CrossEntropyLoss(**options).double().to(x.device)
    expected = per_sample_squared_norms(model, loss_fn, x, y, shares_of="mean")
    with FisherMonitor(model) as monitor:
        loss_fn(model(x), y).backward()
    for name, t in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), t.mean(), monitor.trace)
