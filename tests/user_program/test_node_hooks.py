"""Hooks of the user's on nodes that change what the nodes return: in every pass they are in the numbers, or refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oracles import assert_equal, per_sample_squared_norms
from problems._base import Forward
from torch_secorder import FisherMonitor
from torch_secorder.errors import UnsupportedError
from traps.exactness import numbers

Hook = Callable[..., Any]


def halves(returned: tuple[Tensor | None, ...], _: object) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x / 2 for x in returned)


def writes(returned: tuple[Tensor | None, ...], _: object) -> None:
    for x in returned:
        if x is not None:
            x.mul_(2)


def writes_unseen(returned: tuple[Tensor | None, ...], _: object) -> None:
    """No version tells of it."""
    for x in returned:
        if x is not None:
            x.data.mul_(2)


CHANGES: dict[str, Hook] = {"other tensors": halves, "a write": writes, "a write on .data": writes_unseen}


def looks(returned: tuple[Tensor | None, ...], _: object) -> tuple[Tensor | None, ...]:
    """Returns the same tensors in another tuple."""
    return (*returned,)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 4), (5, 4)),
    "linear over positions": (lambda: nn.Linear(4, 4), (5, 3, 4)),
    "without bias": (lambda: nn.Linear(4, 4, bias=False), (5, 3, 4)),
    "convolution": (lambda: nn.Conv1d(4, 4, 3, padding=1), (5, 4, 6)),
    "norm": (lambda: nn.LayerNorm(4), (5, 4)),
    "embedding": (lambda: nn.Embedding(7, 4), ()),
    "parameter": (lambda: Forward(lambda self, x: x @ self.inner.weight, inner=nn.Linear(4, 4, bias=False)), (5, 4)),
    "computed weight": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), (5, 4)),
}
# Its output is a view: what hooks on the view's node return is the gradient of what it is a view of, and in the numbers.
VIEW = "linear over positions"


class Subject(nn.Module):
    """A layer before a Linear, with hooks on the node of its output, put on before the library's or after them."""

    def __init__(self, name: str, hooks: list[Hook], early: bool):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, 4), LAYERS[name][0](), nn.Linear(4, 3)
        self.shape, self.hooks, self.early = LAYERS[name][1], hooks, early
        if early:
            self.layer.register_forward_hook(self.put_on)

    def put_on(self, module: nn.Module, args: Any, output: Tensor) -> None:
        for hook in self.hooks:
            output.grad_fn.register_hook(hook)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            x = self.first(x.movedim(1, -1)).movedim(-1, 1) if isinstance(self.layer, nn.Conv1d) else self.first(x)
        h = self.layer(x.tanh() if x.is_floating_point() else x)
        if not self.early:
            self.put_on(self.layer, (), h)
        return self.last(h.movedim(1, -1) if isinstance(self.layer, nn.Conv1d) else h)

    def batch(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.shape).double() if self.shape else torch.randint(7, (5, 3))
        return x, torch.randn(self(x).shape).double()


def subject(name: str, hooks: list[Hook], early: bool = False) -> Subject:
    torch.manual_seed(0)
    return Subject(name, hooks, early).double()


@pytest.mark.parametrize("passes", [0, 3])  # after three, the next pass is not one whose sums are checked
@pytest.mark.parametrize("early", [False, True], ids=["after ours", "before ours"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [name for name in LAYERS if name != VIEW])
def test_a_change_of_a_parameters_gradient_is_refused(name: str, change: str, early: bool, passes: int) -> None:
    hooks: list[Hook] = []
    model, twin_hooks = subject(name, hooks, early), [CHANGES[change]]
    x, y = model.batch()
    twin = subject(name, twin_hooks, early)
    numbers(twin(x), y).backward()
    expected = [None if p.grad is None else p.grad.clone() for p in twin.parameters()]
    with FisherMonitor(model) as monitor:
        for _ in range(passes):
            numbers(model(x), y).backward()
        model.zero_grad()
        hooks.append(CHANGES[change])
        words = "a hook on the node that computes its gradients"
        with pytest.raises(UnsupportedError, match=words):
            numbers(model(x), y).backward()
    assert monitor.n_samples == 5 * passes
    found = [p.grad for p in model.parameters()]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("early", [False, True], ids=["after ours", "before ours"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_hook_that_looks_is_none_of_our_business(name: str, early: bool) -> None:
    hooks: list[Hook] = []
    model = subject(name, hooks, early)
    x, y = model.batch()
    right = per_sample_squared_norms(model, numbers, x, y)
    seen: list[int] = []
    hooks += [lambda returned, _: seen.append(len(returned)), looks]
    with FisherMonitor(model) as monitor, FisherMonitor(model) as other:
        for _ in range(4):
            numbers(model(x), y).backward()
    assert len(seen) == 4
    total = torch.stack([t.mean() for t in right.values()]).sum()
    for one in (monitor, other):
        for row, t in right.items():
            assert_equal(torch.tensor(one.report().fisher_trace[row]), t.mean(), total, torch.float64)


@pytest.mark.parametrize("passes", [0, 3])
def test_a_change_of_a_layers_inputs_gradient_is_in_the_numbers(passes: int) -> None:
    """As scaling the gradients of all that lies before a layer."""

    def scaled(returned: tuple[Tensor | None, ...], _: object) -> tuple[Tensor | None, ...]:
        bias, x, weight = returned
        assert x is not None
        return bias, 3 * x, weight

    hooks: list[Hook] = []
    model = subject("linear", hooks)
    x, y = model.batch()
    right = per_sample_squared_norms(model, numbers, x, y)
    with FisherMonitor(model, per_sample=True) as monitor:
        for _ in range(passes):
            numbers(model(x), y).backward()
        hooks.append(scaled)
        numbers(model(x), y).backward()
    for row, t in right.items():
        found = torch.tensor(monitor.per_sample[row].to_numpy()[-5:])
        torch.testing.assert_close(found, t * (9 if row.startswith("first") else 1), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("passes", [0, 3])
@pytest.mark.parametrize("early", [False, True], ids=["after ours", "before ours"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_on_the_node_of_a_view_is_in_the_numbers(change: str, early: bool, passes: int) -> None:
    hooks: list[Hook] = []
    model = subject(VIEW, hooks, early)
    x, y = model.batch()
    right = per_sample_squared_norms(model, numbers, x, y)
    with FisherMonitor(model, per_sample=True) as monitor:
        for _ in range(passes):
            numbers(model(x), y).backward()
        hooks.append(CHANGES[change])
        numbers(model(x), y).backward()
    factor = 1 / 4 if change == "other tensors" else 4
    for row, t in right.items():
        found = torch.tensor(monitor.per_sample[row].to_numpy()[-5:])
        torch.testing.assert_close(found, t if row.startswith("last") else factor * t, rtol=1e-10, atol=1e-14)


def test_a_hook_that_is_put_on_in_the_backward_pass_itself_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    with FisherMonitor(model) as monitor:
        outputs = model(x)
        first = outputs.grad_fn.next_functions[1][0].next_functions[0][0]
        model[2].weight.register_hook(lambda _: first.register_hook(looks) and None)
        with pytest.raises(UnsupportedError, match="put on in the backward pass itself"):
            numbers(outputs, y).backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(Exception, match="no sample was seen"):
        monitor.report()


def put_on(hook: Hook, module: nn.Module, args: Any, output: Tensor) -> None:
    if output.grad_fn is not None:  # not in the forward of a re-entrant checkpoint
        output.grad_fn.register_hook(hook)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("hook", [halves, looks])
def test_a_hook_inside_of_a_checkpoint(hook: Hook, reentrant: bool) -> None:
    """Of a re-entrant one the nodes are made in the backward pass itself."""
    layer = nn.Linear(4, 4).double()
    model = Forward(
        lambda self, x: self.last(checkpoint(self.first, x, use_reentrant=reentrant).tanh()),
        first=layer,
        last=nn.Linear(4, 3).double(),
    )
    x, y = torch.randn(5, 4).double().requires_grad_(), torch.randn(5, 3).double()
    right = per_sample_squared_norms(
        nn.Sequential(model.first, nn.Tanh(), model.last), numbers, x.detach(), y
    )  # in the order of the parameters
    layer.register_forward_hook(partial(put_on, hook))
    refused = pytest.raises(UnsupportedError, match="a hook on the node that computes its gradients")
    with refused if hook is halves else nullcontext(), FisherMonitor(model) as monitor:
        numbers(model(x), y).backward()
    if hook is looks:
        total = torch.stack([t.mean() for t in right.values()]).sum()
        for found, t in zip(monitor.report().fisher_trace, right.values(), strict=True):
            assert_equal(torch.tensor(found, dtype=torch.float64), t.mean(), total, torch.float64)


@pytest.mark.parametrize("passes", [0, 3])
def test_a_hook_before_the_accumulation_leaves_the_gradients_norm_out(passes: int) -> None:
    """Its trace is that of the loss, as with a hook on the parameter; what is added to .grad is not known to us."""
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    right = per_sample_squared_norms(model, numbers, x, y)
    node = torch.autograd.graph.get_gradient_edge(model[0].weight).node
    with FisherMonitor(model) as monitor:
        for _ in range(passes):
            numbers(model(x), y).backward()
        before = monitor.report().grad_sq_norm if passes else None
        node.register_prehook(lambda grads: (2 * grads[0],))
        numbers(model(x), y).backward()
    after = monitor.report()
    total = torch.stack([t.mean() for t in right.values()]).sum()
    for row, t in right.items():
        assert_equal(torch.tensor(after.fisher_trace[row]), t.mean(), total, torch.float64)
    if before is None:
        assert after.grad_sq_norm.isna().all()
    else:
        assert after.grad_sq_norm.to_dict() == pytest.approx(before.to_dict())
