"""Trap 19 with several outputs: what one of them shows of its samples says nothing of another, but where both are computed
from the same layers. Each model states its outcome with as many steps or members in front as samples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expectations import expectation
from oracles import assert_equal
from problems._base import Forward, randomized
from torch_secorder import FisherMonitor
from torch_secorder.graph import one_reading
from traps.test_samples_of_arguments import (
    BEHIND,
    IN_FRONT,
    OF_MEMBERS,
    PACKED_FIRST,
    UNSHOWN,
    UNSHOWN_STEPS,
    N,
    batch,
    heads,
    looped,
)
from traps.test_samples_of_arguments import assert_exact as exact_of_one

Outputs = tuple[Tensor, ...] | dict[str, Tensor]


def squares(outputs: Outputs) -> Tensor:
    several = list(outputs.values()) if isinstance(outputs, dict) else outputs
    return torch.stack([x.square().sum() for x in several]).sum()


def beside(inner: nn.Module, x: Tensor, *, comes_first: bool, of_frozen: bool = False) -> nn.Module:
    """A model with another output, which has its samples first and as many features as nothing else has."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        flat = x.double().flatten(1)
        found = m.inner(x), m.side(flat.sin() if of_frozen else flat)
        return found if comes_first else found[::-1]

    return Forward(forward, inner=inner, side=randomized(nn.Linear(x[0].numel(), 3)).double())


assert_exact = partial(exact_of_one, steps=3, loss=squares)


def assert_refused(model: nn.Module, x: Tensor, says: str, steps: int = 6) -> None:
    with FisherMonitor(model, "sum") as monitor:
        for _ in range(steps):
            with expectation(says):
                squares(model(x)).backward()
    assert monitor.n_samples == 0


@pytest.mark.parametrize("comes_first", [True, False])
@pytest.mark.parametrize("name", [*IN_FRONT, *OF_MEMBERS])
def test_trap_19_another_output_does_not_settle_what_is_in_front(name: str, comes_first: bool) -> None:
    inner, shape = (IN_FRONT | OF_MEMBERS)[name](N)
    x = batch(shape, name)
    model = beside(inner, x, comes_first=comes_first)
    axis = 2 if name == "two axes in front" else 1
    why = "has such parameters of its own" if name in OF_MEMBERS else "takes all of the model's samples for each index"
    key = 0 if comes_first else 1
    assert_refused(model, x, rf"{why}.*batch_axis={{'outputs': {{{key}: {axis}}}}}, and None")
    assert_exact(model, x, batch_axis={"outputs": {key: axis}})


@pytest.mark.parametrize("of_frozen", [False, True], ids=["of data", "of frozen layers"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", UNSHOWN_STEPS)
def test_trap_19_steps_that_nothing_shows_beside_another_output(name: str, axis: int, of_frozen: bool) -> None:
    steps = Forward(lambda m, x: m.inner(x).transpose(0, axis), inner=UNSHOWN_STEPS[name]())
    x = torch.randn(N, N, 4).double()
    model = beside(steps, x, comes_first=True, of_frozen=of_frozen)
    if (name, axis) == PACKED_FIRST and x.device.type == "cpu":  # A recurrence shows its steps in the nodes of the CPU.
        assert_exact(model, x)
        return
    assert_refused(model, x, rf"on axis 0 or on axis 1 .*batch_axis={{'outputs': {{0: {axis}}}}}")
    assert_exact(model, x, batch_axis={"outputs": {0: axis}})


@pytest.mark.parametrize("comes_first", [True, False])
@pytest.mark.parametrize("name", [name for name in BEHIND if name != "in reverse"])
def test_trap_19_samples_first_in_both_outputs(name: str, comes_first: bool) -> None:
    """Exact but where a model of this output alone is refused; a batch of another size shows it there."""
    inner, shape = BEHIND[name](N)
    x = batch(shape, name)
    model = beside(inner, x, comes_first=comes_first)
    if (name, N) not in UNSHOWN:
        assert_exact(model, x)
        return
    assert_refused(model, x, r"may be on axis 0 or on axis 1 of an output", steps=1)
    assert_exact(model, x, batch_axis={"outputs": {0 if comes_first else 1: 0}})
    expected = looped(model, x, squares)[1] + looped(model, x[:2], squares)[1]
    with FisherMonitor(model, "sum") as monitor:
        squares(model(x[:2])).backward()
        squares(model(x)).backward()
    assert_equal(monitor.trace, expected, expected, torch.float64)


# Two outputs of one layer, which no data leads to, of a frozen table's rows.


def attention(h: Tensor, values: Tensor) -> Tensor:
    return (h @ h.mT).softmax(-1) @ values


# Of values that a layer makes of a frozen table's rows, and of those of another layer.
OF_ONE_LAYER: dict[str, Callable[[Any, Tensor, Tensor], Outputs]] = {
    "values, and what attention makes of them": lambda m, h, v: (m.head(attention(h, v)), v),
    "in the other order": lambda m, h, v: (v, m.head(attention(h, v))),
    "values of several heads": lambda m, h, v: {
        "values": v.view(len(h), -1, 2, 2).transpose(1, 2),
        "attention": m.head(attention(h, v)),
    },
    "one through another": lambda m, h, v: (lambda w: (w, v + w, m.head(attention(h, v))))(m.w(h)),
}
# Two calls of a layer show nothing of each other, and an output with one axis of as many indices may have steps there.
OF_TWO_CALLS: dict[str, tuple[int, Callable[[Any, Tensor, Tensor], Outputs]]] = {
    "two calls": (0, lambda m, h, v: {"values": v, "attention": m.head(attention(h, m.v(h)))}),
    "two layers": (0, lambda m, h, v: {"values": v, "attention": m.head(attention(h, m.w(h)))}),
    "their mean": (0, lambda m, h, v: {"values": v, "mean": m.head(v.mean(1))}),
    "steps in front of the mean": (1, lambda m, h, v: {"values": v.transpose(0, 1), "mean": m.head(v.mean(1))}),
    "steps in front of attention": (1, lambda m, h, v: {"values": v.transpose(0, 1), "same": m.head(attention(h, v))}),
    "steps in front of another layer": (
        1,
        lambda m, h, v: {"values": v.transpose(0, 1), "mean": m.head(m.w(h).mean(1))},
    ),
}


def of_a_table(forward: Callable[[Any, Tensor, Tensor], Outputs]) -> nn.Module:
    parts = {"table": nn.Embedding(9, 4), "v": nn.Linear(4, 4), "w": nn.Linear(4, 4), "head": nn.Linear(4, 7)}
    calls: set[str] = set()

    def whole(m: Any, ids: Tensor) -> Outputs:
        h = m.table(ids)
        return forward(m, h, m.v(h))

    model = randomized(Forward(whole, **parts)).double()
    hooks = [one.register_forward_hook(lambda *_, name=name: calls.add(name)) for name, one in model.named_children()]
    model(torch.zeros(2, 2).long())
    for name, hook in zip(parts, hooks, strict=True):
        hook.remove()
        model.get_submodule(name).requires_grad_(name in calls and name != "table")
    return model


@pytest.mark.parametrize("name", OF_ONE_LAYER)
def test_trap_19_an_output_shows_the_samples_of_layers_that_lead_to_another(name: str) -> None:
    assert_exact(of_a_table(OF_ONE_LAYER[name]), torch.randint(9, (N, N)))


@pytest.mark.parametrize("name", OF_TWO_CALLS)
def test_trap_19_an_output_that_nothing_shows_settles_no_other_one(name: str) -> None:
    axis, forward = OF_TWO_CALLS[name]
    model, ids = of_a_table(forward), torch.randint(9, (N, N))
    assert_refused(model, ids, r"may be on axis 0 or on axis 1 of an output of shape \(5, 5, 4\)")
    assert_exact(model, ids, batch_axis={"outputs": {"values": axis}})


def test_trap_19_outputs_inside_of_another_ones_graph_are_asked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of all layers beside the last one's cost a search of their own only if they are not on the way to that."""
    asked: list[Tensor] = []
    whole = one_reading._answer

    def answer(reading: Any, *args: Any) -> Any:
        asked.extend(x for x, _ in reading.graph.placed)
        return whole(reading, *args)

    monkeypatch.setattr(one_reading, "_answer", answer)

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        states = [x]
        for layer in m.layers:
            states.append(layer(states[-1]).tanh() + attention(states[-1], states[-1]))
        return tuple(states[1:])

    model, x = randomized(Forward(forward, layers=heads(4, 4, 4))).double(), torch.randn(N, N, 4).double()
    with FisherMonitor(model, "sum"):
        outputs = model(x)
    assert len(asked) == 1
    assert asked[0] is outputs[-1]
    assert_exact(model, x)


@pytest.mark.parametrize("name", [*IN_FRONT, *OF_MEMBERS])
def test_trap_19_an_output_that_the_loss_does_not_use_refuses_nothing(name: str) -> None:
    inner, shape = (IN_FRONT | OF_MEMBERS)[name](N)
    x = batch(shape, name)
    model = beside(inner, x, comes_first=True)
    rows = [torch.autograd.grad(squares(model(x[i : i + 1])[1:]), list(model.side.parameters())) for i in range(N)]
    expected = torch.stack([g.square().sum() for row in rows for g in row]).sum()
    with FisherMonitor(model, "sum") as monitor:
        for _ in range(3):
            squares(model(x)[1:]).backward()
    assert_equal(monitor.trace, 3 * expected, 3 * expected, torch.float64)


def test_trap_19_similarities_of_all_samples_beside_what_they_are_computed_from() -> None:
    """Each of their axes may have the samples, for all that shapes say, and neither has: they compare samples."""

    def forward(m: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        left, right = m.v(x.sin()), m.w(y.sin())
        return {"logits": left @ right.T, "left": left, "right": right}

    model = randomized(Forward(forward, v=nn.Linear(4, 3), w=nn.Linear(4, 3))).double()
    x, y = torch.randn(N, 4).double(), torch.randn(N, 4).double()
    pairs = [model(x[i : i + 1], y[i : i + 1]) for i in range(N)]
    rows = [torch.autograd.grad(squares((one["left"], one["right"])), list(model.parameters())) for one in pairs]
    expected = torch.stack([g.square().sum() for row in rows for g in row]).sum()
    with FisherMonitor(model, "sum") as monitor:
        for _ in range(4):
            found = model(x, y)
            squares((found["left"], found["right"])).backward()
    assert_equal(monitor.trace, 4 * expected, 4 * expected, torch.float64)
    with FisherMonitor(model, "sum"), expectation("compares samples with each other"):
        squares((model(x, y)["logits"],)).backward()


# What another output must not settle: it has as many rows, which are not the samples', or hides what it is computed from.


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def steps_of(x: Tensor) -> Tensor:
    return x.sin().transpose(0, 1)


def attended(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = steps_of(x)
    weights = torch.einsum("tnd,snd->nts", m.a(h), m.b(h)).softmax(-1)
    return torch.einsum("nts,snd->tnd", weights, m.c(h)), weights.mean(0)


BESIDE: dict[str, Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    "the mean of each step": lambda m, x: (lambda h: (m.c(h), (m.b(h) + h).mean((1, 2))))(m.a(steps_of(x)).tanh()),
    "a mean map of attention": attended,
    "steps and features in one axis": lambda m, x: (lambda h: (m.b(h), m.c(h).flatten(1)))(m.a(steps_of(x))),
    "a head behind a reversal": lambda m, x: (lambda h: (h, m.c(m.b(Reversal.apply(h)))))(m.a(steps_of(x))),
    "a branch in a checkpoint": lambda m, x: (
        m.a(steps_of(x)),
        checkpoint(m.c, m.b(steps_of(x)), use_reentrant=False),
    ),
    "samples once for each step": lambda m, x: (
        m.a(x[:, 0].sin()).expand(N, -1, -1),
        m.c(m.b(x[:, 1].tanh())),
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_trap_19_what_another_output_must_not_settle(name: str) -> None:
    parts = {one: nn.Linear(4, 4) for one in "abc"}
    model, x = randomized(Forward(BESIDE[name], **parts)).double(), torch.randn(N, N, 4).double()
    words = {"batch_axis": {"outputs": {0: 1, 1: None if "head" not in name and "branch" not in name else 1}}}
    if name == "samples once for each step":
        words = {"batch_axis": {"outputs": {0: 1}}}

    def loss(outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0].square().sum()

    with FisherMonitor(model, "sum") as monitor:
        for _ in range(3):
            with expectation(r"may be on axis 0 or on axis 1 of an output of shape \(5, 5, 4\)"):
                loss(model(x)).backward()
    assert monitor.n_samples == 0
    named = dict(model.named_parameters())
    rows = [torch.autograd.grad(loss(model(x[i : i + 1])), named.values(), allow_unused=True) for i in range(N)]
    expected = torch.stack([g.square().sum() for row in rows for g in row if g is not None]).sum()
    with FisherMonitor(model, "sum", **words) as monitor:
        for _ in range(3):
            loss(model(x)).backward()
    assert_equal(monitor.trace, 3 * expected, 3 * expected, torch.float64)


ON_STEPS_ALONE: dict[str, Callable[[Any, int], Tensor]] = {
    "positions": lambda m, t: m.table(torch.arange(t))[:, None],
    "a layer on times": lambda m, t: m.layer(torch.arange(t).double()[:, None] / t)[:, None],
    "a network on times": lambda m, t: m.head(m.layer(torch.arange(t).double()[:, None] / t).tanh())[:, None],
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ON_STEPS_ALONE)
def test_trap_19_layers_on_steps_alone_show_no_samples(name: str, axis: int) -> None:
    """They have a row for each step, which is a sample's if steps in front are taken for samples."""
    parts = {"v": nn.Linear(4, 3), "layer": nn.Linear(1, 3), "table": nn.Embedding(N, 3), "head": nn.Linear(3, 3)}

    def forward(m: Any, x: Tensor) -> tuple[Tensor]:
        return ((m.v(steps_of(x)).tanh() + ON_STEPS_ALONE[name](m, x.shape[1])).transpose(0, 1 - axis),)

    model, x = randomized(Forward(forward, **parts)).double(), torch.randn(N, N, 4).double()
    used = {"positions": ("v", "table"), "a layer on times": ("v", "layer")}.get(name, ("v", "layer", "head"))
    for one in parts.keys() - set(used):
        model.get_submodule(one).requires_grad_(False)
    assert_refused(model, x, rf"may be on axis 0 or on axis 1 .*batch_axis={{'outputs': {axis}}}")
    assert_exact(model, x, batch_axis={"outputs": axis})


def test_trap_19_every_output_in_doubt_has_to_be_said() -> None:
    """The refusal names all of them; what is said of one leaves the others in doubt."""
    model = randomized(
        Forward(
            lambda m, x: {"a": torch.stack([one(x) for one in m.a]), "b": torch.stack([one(x).tanh() for one in m.b])},
            a=heads(N, 4, 3),
            b=heads(N, 4, 2),
        )
    ).double()
    x = torch.randn(N, 4).double()
    for words in ({}, {"batch_axis": {"outputs": {"a": 1}}}, {"batch_axis": {"outputs": {"b": 1}}}):
        named = "'a': 1, 'b': 1" if not words else "'b': 1" if "a" in words["batch_axis"]["outputs"] else "'a': 1"
        with FisherMonitor(model, "sum", **words) as monitor:
            for _ in range(2):
                with expectation(rf"takes all of the model's samples .*batch_axis={{'outputs': {{{named}}}}}"):
                    squares(model(x)).backward()
        assert monitor.n_samples == 0
    assert_exact(model, x, batch_axis={"outputs": {"a": 1, "b": 1}})
