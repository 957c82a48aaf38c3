"""Trap 19: as many steps or members in front of the outputs as samples. What is made of the model's arguments tells them apart.

Each model states its outcome where there are as many in front as samples: refused with a remedy that is exact, or exact as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expectations import expectation
from oracles import assert_equal
from problems._base import Forward, randomized
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report
from torch_secorder.errors import CurvatureError, ShapeError
from torch_secorder.graph import samples_in_data

N = 5

# Another shift and scale for each of four features, and what mixes these.
SHIFTS, SCALES = torch.tensor([0.3, -0.2, 0.0, 0.5]).double(), torch.tensor([1.2, -0.3, 1.0, 0.5]).double()
MIXES = torch.tensor([[0.1, 0.2, 0, 0.1], [0, 0.1, 0.1, 0.3], [0.1, 0, 0.2, 0], [0.2, 0.1, 0, 0.1]]).double()

Model = Callable[[int], tuple[nn.Module, tuple[int, ...]]]  # of so many steps or members, with the shape of one sample


def free(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def made(forward: Callable[..., Tensor], **parts: Any) -> nn.Module:
    """A model with these parameters, buffers and modules."""
    model = Forward(forward, **{name: one for name, one in parts.items() if isinstance(one, nn.Module)})
    for name, one in parts.items():
        if isinstance(one, nn.Parameter):
            model.register_parameter(name, one)
    return randomized(model).double()


def membranes(count: int, charge: Callable[[int], Tensor], head: Callable[[Tensor], Tensor]) -> Tensor:
    """Steps of a spiking network, in front of the samples."""
    membrane, outputs = torch.zeros(()).double(), []
    for step in range(count):
        membrane = 0.9 * membrane + charge(step)
        spikes = torch.sigmoid(membrane - 1)
        membrane = membrane - spikes
        outputs.append(head(spikes))
    return torch.stack(outputs)


def copied_steps(m: Any, x: Tensor) -> Tensor:
    steps = x.transpose(0, 1).contiguous()
    return membranes(len(steps), lambda i: steps[i] @ m.w, lambda s: s @ m.v)


def trajectory(m: Any, x: Tensor, count: int) -> list[Tensor]:
    """Steps of an equation whose right side takes the time beside the state."""
    states = []
    for step in range(count):
        x = x + (torch.cat([x, torch.full_like(x[:, :1], step / count)], 1) @ m.w).tanh() @ m.v
        states.append(x)
    return states


def heads(count: int, *sizes: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(*sizes) for _ in range(count)])


IN_FRONT: dict[str, Model] = {
    # Views of the argument.
    "bmm of an expanded view": lambda t: (
        made(lambda m, x: torch.bmm(x.expand(t, -1, -1), m.w).tanh(), w=free(t, 4, 3)),
        (4,),
    ),
    "matmul": lambda t: (made(lambda m, x: (x @ m.w).tanh(), w=free(t, 4, 3)), (4,)),
    "einsum": lambda t: (made(lambda m, x: torch.einsum("nd,edc->enc", x, m.w).tanh(), w=free(t, 4, 3)), (4,)),
    "products in a loop": lambda t: (
        made(lambda m, x: torch.stack([(x @ w).tanh() for w in m.w]), w=free(t, 4, 3)),
        (4,),
    ),
    "a product from the left": lambda t: (
        made(lambda m, x: torch.stack([(w @ x.T).T.tanh() for w in m.w]), w=free(t, 3, 4)),
        (4,),
    ),
    "a gain of each member": lambda t: (
        made(lambda m, x: ((x * m.gain) @ m.w).tanh(), gain=free(t, 1, 4), w=free(4, 3)),
        (4,),
    ),
    "steps of the argument": lambda t: (
        made(lambda m, x: membranes(t, lambda i: x[:, i] @ m.w, lambda s: s @ m.v), w=free(4, 6), v=free(6, 3)),
        (t, 4),
    ),
    "rows of all steps": lambda t: (
        made(lambda m, x: F.linear(x, m.w, m.b).tanh().transpose(0, 1), w=free(3, 4), b=free(3)),
        (t, 4),
    ),
    # Copies.
    "baddbmm of repetitions": lambda t: (
        made(lambda m, x: torch.baddbmm(m.b, x[None].repeat(t, 1, 1), m.w).tanh(), b=free(t, 1, 3), w=free(t, 4, 3)),
        (4,),
    ),
    "bmm of a stack": lambda t: (made(lambda m, x: torch.bmm(torch.stack([x] * t), m.w).tanh(), w=free(t, 4, 3)), (4,)),
    "a cast": lambda t: (made(lambda m, x: torch.bmm(x.double().expand(t, -1, -1), m.w).tanh(), w=free(t, 4, 3)), (4,)),
    "scaled and shifted": lambda t: (
        made(lambda m, x: torch.bmm(((x - 0.3) / 1.7).expand(t, -1, -1), m.w).tanh(), w=free(t, 4, 3)),
        (4,),
    ),
    "steps of a copy": lambda t: (
        made(
            lambda m, x: copied_steps(m, x),
            w=free(4, 6),
            v=free(6, 3),
        ),
        (t, 4),
    ),
    "a transposed copy": lambda t: (
        made(lambda m, x: torch.stack([(x.mT.contiguous() @ w).flatten(1).tanh() for w in m.w]), w=free(t, 2, 3)),
        (2, 4),
    ),
    "a convolution of repetitions": lambda t: (
        made(
            lambda m, x: F.conv1d(x.repeat(t, 1, 1), m.w).view(t, len(x), 9).tanh() * m.gain,
            w=free(3, 2, 2),
            gain=free(t, 1, 9),
        ),
        (2, 4),
    ),
    "a spiking network of functions": lambda t: (
        made(
            lambda m, x: membranes(t, lambda _: F.linear(x, m.w, m.b), lambda s: s @ m.v),
            w=free(6, 4),
            b=free(6),
            v=free(6, 3),
        ),
        (4,),
    ),
    # Layers.
    "an ensemble of layers": lambda t: (
        made(lambda m, x: torch.stack([one(x).tanh() for one in m.heads]), heads=heads(t, 4, 3)),
        (4,),
    ),
    "an ensemble with one number each": lambda t: (
        made(lambda m, x: torch.stack([one(x).tanh().squeeze(-1) for one in m.heads]), heads=heads(t, 4, 1)),
        (4,),
    ),
    "an ensemble of convolutions": lambda t: (
        made(
            lambda m, x: torch.stack([one(x).flatten(1).tanh() for one in m.convs]),
            convs=nn.ModuleList([nn.Conv1d(2, 3, 2) for _ in range(t)]),
        ),
        (2, 4),
    ),
    "an ensemble of recurrent layers": lambda t: (
        made(
            lambda m, x: torch.stack([one(x)[0][:, -1] for one in m.recurrent]),
            recurrent=nn.ModuleList([nn.GRU(4, 3, batch_first=True) for _ in range(t)]),
        ),
        (2, 4),
    ),
    "a layer on an expanded view": lambda t: (
        made(
            lambda m, x: m.head(m.layer(x.expand(t, -1, -1)).tanh() * m.gain),
            layer=nn.Linear(4, 6),
            head=nn.Linear(6, 3),
            gain=free(t, 1, 6),
        ),
        (4,),
    ),
    "a layer on repetitions": lambda t: (
        made(
            lambda m, x: m.head(m.layer(x.repeat(t, 1)).view(t, -1, 6).tanh() * m.gain),
            layer=nn.Linear(4, 6),
            head=nn.Linear(6, 3),
            gain=free(t, 1, 6),
        ),
        (4,),
    ),
    "a trunk and heads": lambda t: (
        made(
            lambda m, x: torch.stack([one(m.trunk(x).tanh()) for one in m.heads]),
            trunk=nn.Linear(4, 6),
            heads=heads(t, 6, 3),
        ),
        (4,),
    ),
    # What is computed from the argument before parameters take part.
    "another scale for each feature": lambda t: (
        made(
            lambda m, x: torch.bmm(((x - SHIFTS.to(x)) * SCALES.to(x)).expand(t, -1, -1), m.w).tanh(), w=free(t, 4, 3)
        ),
        (4,),
    ),
    "another scale for each feature of steps": lambda t: (
        made(lambda m, x: torch.stack([s @ m.w for s in (x * SCALES.to(x)).transpose(0, 1)]).tanh(), w=free(4, 3)),
        (t, 4),
    ),
    "features of frozen layers": lambda t: (
        made(
            lambda m, x: torch.stack([one(x.sin() @ MIXES.to(x)).tanh() for one in m.heads]),
            heads=heads(t, 4, 3),
        ),
        (4,),
    ),
    "repeated features of frozen layers": lambda t: (
        made(lambda m, x: torch.bmm((x.sin() @ MIXES.to(x)).repeat(t, 1, 1), m.w).tanh(), w=free(t, 4, 3)),
        (4,),
    ),
    "a spectrum in products": lambda t: (
        made(lambda m, x: torch.stack([(torch.fft.rfft(x).abs() @ w).tanh() for w in m.w]), w=free(t, 3, 2)),
        (4,),
    ),
    "ids that are computed": lambda t: (
        made(
            lambda m, x: (m.table(x.argsort(1).expand(t, -1, -1)).flatten(2) * m.gain).tanh(),
            table=nn.Embedding(4, 3),
            gain=free(t, 1, 12),
        ),
        (4,),
    ),
    "steps of an equation": lambda t: (
        made(lambda m, x: torch.stack(trajectory(m, x, t)), w=free(5, 6), v=free(6, 4)),
        (4,),
    ),
    "two axes in front": lambda t: (
        made(lambda m, x: torch.stack([torch.stack([(x @ w).tanh(), (x @ w).sin()]) for w in m.w]), w=free(t, 4, 3)),
        (4,),
    ),
}

# Nothing shows what members make of such data: each takes it by a sum, or all share what was computed of it, or it is random.
OF_MEMBERS: dict[str, Model] = {
    "sums": lambda t: (made(lambda m, x: torch.stack([(x.sin() + b).tanh() for b in m.b]), b=free(t, 4)), (4,)),
    "sums of all members": lambda t: (made(lambda m, x: (x.sin() + m.b).tanh(), b=free(t, 1, 4)), (4,)),
    "heads of shared features": lambda t: (
        made(
            lambda m, x: (lambda shared: torch.stack([one(shared).tanh() for one in m.heads]))(
                (x.sin() @ MIXES.to(x) + m.shift).tanh()
            ),
            heads=heads(t, 4, 3),
            shift=free(4),
        ),
        (4,),
    ),
    "recurrent layers on shared features": lambda t: (
        made(
            lambda m, x: torch.stack([one(x.sin() + m.shift)[0][:, -1] for one in m.recurrent]),
            shift=free(4),
            recurrent=nn.ModuleList([nn.LSTM(4, 3, batch_first=True) for _ in range(t)]),
        ),
        (2, 4),
    ),
    "other features for each member": lambda t: (
        made(
            lambda m, x: torch.stack([(x * (i + 1)).sin() @ w for i, w in enumerate(m.w)]).tanh(),
            w=free(t, 4, 3),
        ),
        (4,),
    ),
}

BEHIND: dict[str, Model] = {
    "einsum": lambda t: (made(lambda m, x: torch.einsum("nd,edc->nec", x, m.w).tanh(), w=free(t, 4, 3)), (4,)),
    "bmm": lambda t: (
        made(lambda m, x: torch.bmm(x.expand(t, -1, -1), m.w).tanh().transpose(0, 1), w=free(t, 4, 3)),
        (4,),
    ),
    "an ensemble of layers": lambda t: (
        made(lambda m, x: torch.stack([one(x).tanh() for one in m.heads], 1), heads=heads(t, 4, 3)),
        (4,),
    ),
    "a layer on repetitions": lambda t: (
        made(
            lambda m, x: m.head(m.layer(x[:, None].repeat(1, t, 1)).tanh() * m.gain),
            layer=nn.Linear(4, 6),
            head=nn.Linear(6, 3),
            gain=free(t, 6),
        ),
        (4,),
    ),
    "a spiking network": lambda t: (
        made(
            lambda m, x: membranes(t, lambda i: x[:, i] @ m.w, lambda s: s @ m.v).transpose(0, 1),
            w=free(4, 6),
            v=free(6, 3),
        ),
        (t, 4),
    ),
    "positions": lambda t: (
        made(
            lambda m, x: ((x + m.positions) * torch.arange(t)[:, None].expand(t, 4).expand(len(x), -1, -1)) @ m.w,
            positions=free(t, 4),
            w=free(4, 3),
        ),
        (t, 4),
    ),
    "rows of all steps": lambda t: (made(lambda m, x: F.linear(x, m.w, m.b).tanh(), w=free(3, 4), b=free(3)), (t, 4)),
    "features of frozen layers": lambda t: (
        made(lambda m, x: ((x.sin() @ MIXES.to(x)) @ m.w).tanh(), w=free(4, 3)),
        (t, 4),
    ),
    "rows that are shared, and steps beside samples": lambda t: (
        made(
            lambda m, x: (
                torch.einsum("lbtd,sd->slbt", torch.stack([x, x.tanh()]), m.layer(m.w)).sum(1).permute(1, 2, 0)
            ),
            layer=nn.Linear(4, 4),
            w=free(4, 4),
        ),
        (t, 4),
    ),
    "another scale for each feature": lambda t: (
        made(lambda m, x: ((x * SCALES.to(x)) @ m.w).tanh(), w=free(4, 3)),
        (t, 4),
    ),
    "frozen features and positions": lambda t: (
        made(
            lambda m, x: (
                (x.sin() @ MIXES.to(x)) @ m.w + torch.arange(4.0 * t).double().view(t, 4).expand(len(x), -1, -1) @ m.v
            ).tanh(),
            w=free(4, 3),
            v=free(4, 3),
        ),
        (t, 4),
    ),
    "one by one": lambda t: (
        made(
            lambda m, x: torch.stack([(row.expand(t, -1) @ m.w).tanh() * m.gain for row in x]),
            w=free(4, 3),
            gain=free(t, 1),
        ),
        (4,),
    ),
    "steps of an equation": lambda t: (
        made(lambda m, x: torch.stack(trajectory(m, x, t), 1), w=free(5, 6), v=free(6, 4)),
        (4,),
    ),
    "as many classes as samples": lambda t: (made(lambda m, x: (x @ m.w).tanh(), w=free(4, t)), (4,)),
    "in reverse": lambda t: (
        made(lambda m, x: torch.stack([(x.flip(0).contiguous() @ w).tanh() for w in m.w], 1).flip(0), w=free(t, 4, 3)),
        (4,),
    ),
}


# As many steps as samples, of data that nothing follows, and the same parameters for each of them.
UNSHOWN = [
    (name, N)
    for name in (
        "features of frozen layers",
        "rows that are shared, and steps beside samples",
        "frozen features and positions",
    )
]


def in_turn(m: Any, x: Tensor) -> Tensor:
    """Samples in the order of a number of each, before a parameter takes part, and back."""
    order = x.sum((1, 2)).argsort()
    found = m.layer(x[order])
    return torch.empty_like(found).index_put((order,), found)


def packed(m: Any, x: Tensor) -> Tensor:
    lengths = 1 + (x[..., 0] > 0).sum(1).clamp(max=x.shape[1] - 1)
    of_steps = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    found, _ = nn.utils.rnn.pad_packed_sequence(m.recurrent(of_steps)[0], batch_first=True, total_length=x.shape[1])
    return m.layer(found)


def layered(features: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """A layer on features that no parameter takes part in."""
    return made(lambda m, x: m.layer(features(m, x)), layer=nn.Linear(4, 3))


UNSHOWN_STEPS: dict[str, Callable[[], nn.Module]] = {
    "frozen features": lambda: layered(lambda m, x: (x.sin() @ MIXES.to(x)).tanh()),
    "a spectrum": lambda: layered(lambda m, x: torch.fft.rfft(x, n=6).abs()),
    "rows of a frozen table": lambda: layered(lambda m, x: MIXES.to(x)[(3 * x.abs().sum(-1)).long() % 4]),
    "sorted samples": lambda: made(in_turn, layer=nn.Linear(4, 3)),
    "packed samples": lambda: made(packed, recurrent=nn.LSTM(4, 4, batch_first=True), layer=nn.Linear(4, 3)),
}


# The steps of a recurrence all take what the first one has made of the data.
PACKED_FIRST = "packed samples", 0


def squares(outputs: Tensor) -> Tensor:
    return outputs.square().sum()


def looped(model: nn.Module, x: Tensor, loss: Callable[[Any], Tensor] = squares) -> tuple[dict[str, Tensor], Tensor]:
    """By a loop over samples: the trace of each parameter, and their sum."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [torch.autograd.grad(loss(model(x[i : i + 1])), list(named.values())) for i in range(len(x))]
    found = {
        name: torch.stack([g.square().sum() for g in column]).sum()
        for name, column in zip(named, zip(*rows, strict=True), strict=True)
    }
    return found, torch.stack(list(found.values())).sum()


def batch(shape: tuple[int, ...], name: str) -> Tensor:
    x = torch.randn(N, *shape)
    return x if name == "a cast" else x.double()


def assert_exact(
    model: nn.Module, x: Tensor, steps: int = 1, loss: Callable[[Any], Tensor] = squares, **words: Any
) -> None:
    expected, everything = looped(model, x, loss)
    with FisherMonitor(model, "sum", **words) as monitor:
        for _ in range(steps):
            loss(model(x)).backward()
    assert monitor.n_samples == steps * len(x)
    for name, t in expected.items():
        found = torch.tensor(monitor.report().loc[name, "fisher_trace"])
        assert_equal(found, steps * t, steps * everything, torch.float64)


@pytest.mark.parametrize("name", [*IN_FRONT, *OF_MEMBERS])
def test_trap_19_as_many_in_front_as_samples(name: str) -> None:
    """A monitor refuses it, in each step, and what it says to pass is exact; so are the functions, which try samples alone."""
    model, shape = (IN_FRONT | OF_MEMBERS)[name](N)
    x = batch(shape, name)
    axis = 2 if name == "two axes in front" else 1
    why = "has such parameters of its own" if name in OF_MEMBERS else "takes all of the model's samples for each index"
    with FisherMonitor(model, "sum") as monitor:
        for _ in range(7):
            with expectation(rf"{why}.* where the model has 5 samples .*batch_axis={{'outputs': {axis}}}"):
                squares(model(x)).backward()
    assert monitor.n_samples == 0
    assert_exact(model, x, batch_axis={"outputs": axis})
    for way in (
        lambda: fisher_report(model, lambda o, t: squares(o), (x, None), reduction="sum", progress=False),
        lambda: empirical_fisher_trace(model, lambda o, t: squares(o), x, None),
    ):
        with pytest.raises(CurvatureError):
            way()


@pytest.mark.parametrize("name", [*IN_FRONT, *OF_MEMBERS])
def test_trap_19_others_in_front_than_samples(name: str) -> None:
    """Three in front of five samples: shapes alone show that the samples are not there."""
    model, shape = (IN_FRONT | OF_MEMBERS)[name](3)
    x = batch(shape, name)
    with pytest.raises(ShapeError, match="can't be found out"), FisherMonitor(model, "sum"):
        squares(model(x)).backward()
    assert_exact(model, x, batch_axis={"outputs": 2 if name == "two axes in front" else 1})


@pytest.mark.parametrize(("name", "count"), [(name, n) for name in BEHIND for n in (N, 3) if (name, n) not in UNSHOWN])
def test_trap_19_steps_and_members_behind_the_samples(name: str, count: int) -> None:
    """The same numbers as steps or members, and others: what is made of the arguments is no reason to refuse any of them."""
    model, shape = BEHIND[name](count)
    x = batch(shape, name)
    expected = looped(model, x)[1] if name != "in reverse" else looped(model, x.flip(0))[1]
    for fresh in (x, x.clone()):
        with FisherMonitor(model, "sum") as monitor:
            for _ in range(4):
                squares(model(fresh)).backward()
        assert_equal(monitor.trace, 4 * expected, 4 * expected, torch.float64)


@pytest.mark.parametrize("features", [3, None], ids=["3 features", "numbers"])
@pytest.mark.parametrize(
    ("name", "axis"), [(name, axis) for name in UNSHOWN_STEPS for axis in (0, 1) if (name, axis) != PACKED_FIRST]
)
def test_trap_19_as_many_steps_as_samples_that_nothing_shows(name: str, axis: int, features: int | None) -> None:
    """Steps behind the samples and in front of them look alike: a monitor has to be told, or shown by a batch of another size."""
    inner, x = UNSHOWN_STEPS[name](), torch.randn(N, N, 4).double()
    model = Forward(lambda m, x: m.inner(x)[..., slice(3) if features else 0].transpose(0, axis), inner=inner)
    with FisherMonitor(model, "sum") as monitor:
        for _ in range(4):
            with expectation(
                rf"samples .* may be on axis 0 or on axis 1 of an output .*batch_axis={{'outputs': {axis}}}"
            ):
                squares(model(x)).backward()
    assert monitor.n_samples == 0
    assert_exact(model, x, steps=3, batch_axis={"outputs": axis})
    if axis == 0:
        assert_exact_after_others(UNSHOWN_STEPS[name](), x)


def test_trap_19_a_recurrence_shows_its_steps() -> None:
    """In the nodes that torch makes of it on the CPU; those of other devices leave it open."""
    model, x = UNSHOWN_STEPS["packed samples"](), torch.randn(N, N, 4).double()
    if x.device.type == "cpu":
        assert_exact(model, x, steps=3)
        return
    with expectation(r"may be on axis 0 or on axis 1 of an output"), FisherMonitor(model, "sum"):
        squares(model(x)).backward()
    assert_exact(model, x, steps=3, batch_axis={"outputs": 0})


@pytest.mark.parametrize(("name", "count"), UNSHOWN)
def test_trap_19_as_many_steps_behind_the_samples_that_nothing_shows(name: str, count: int) -> None:
    model, shape = BEHIND[name](count)
    x = batch(shape, name)
    with expectation(r"may be on axis 0 or on axis 1 of an output"), FisherMonitor(model, "sum"):
        squares(model(x)).backward()
    assert_exact(model, x, steps=3, batch_axis={"outputs": 0})
    assert_exact_after_others(BEHIND[name](count)[0], x)


def assert_exact_after_others(model: nn.Module, x: Tensor) -> None:
    """That a batch of another size has shown where the samples are."""
    fewer, several = looped(model, x[:2])[1], looped(model, x)[1]
    with FisherMonitor(model, "sum") as monitor:
        squares(model(x[:2])).backward()
        for _ in range(5):
            squares(model(x)).backward()
    assert_equal(monitor.trace, fewer + 5 * several, fewer + 5 * several, torch.float64)


def test_trap_19_a_parameter_for_each_sample_has_to_be_said() -> None:
    """A router may send each sample to an expert of its own, by what it computes; as many members look the same."""

    def forward(m: Any, x: Tensor) -> Tensor:
        expert = (x.sin() @ MIXES.to(x))[:, 0].argsort().argsort()
        return (m.experts[expert] * x.sin()).tanh() @ m.head

    model, x = made(forward, experts=free(N, 4), head=free(4, N)), torch.randn(N, 4).double()
    expected = rows_alone(model, x)
    with expectation(r"experts: each index has such .*pass batch_axis={'outputs': 0}"), FisherMonitor(model, "sum"):
        squares(model(x)).backward()
    with FisherMonitor(model, "sum", batch_axis={"outputs": 0}) as monitor:
        squares(model(x)).backward()
    assert_equal(monitor.trace, expected, expected, torch.float64)


# Each sample has rows or an expert of its own, by what is computed of it, and its features are as many as the samples.
CHOSEN: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "rows": lambda m, x, k: m.table[k],
    "rows in between": lambda m, x, k: m.table[k] * 0.25 + m.table[(k + 1) % 20] * 0.75,
    "rows by gather": lambda m, x, k: x.sin() @ MIXES.to(x)[:, :1] + m.table.gather(0, k[:, None].expand(-1, N)),
    "experts": lambda m, x, k: torch.cat([m.experts[int(one)](x[i : i + 1].sin()) for i, one in enumerate(k // 4)]),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_trap_19_parameters_that_are_chosen_for_each_sample_and_used_for_one_feature_each(name: str) -> None:
    """Members would have all samples in common, wherever these are; no entry here is used for several features."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return CHOSEN[name](m, x, (x[:, 0] * 4).round().long()).tanh()

    model = made(forward, table=free(20, N), experts=heads(N, 4, N))
    x = torch.randn(N, 4).double()
    x[:, 0] = torch.randperm(N).double()
    expected = rows_alone(model, x)
    with FisherMonitor(model, "sum") as monitor:
        for _ in range(3):
            squares(model(x)).backward()
    assert_equal(monitor.trace, 3 * expected, 3 * expected, torch.float64)


# By the numbers of its rows an argument may choose parameters of its own for each sample.
ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda table, ids: table[ids],
    "index_select": lambda table, ids: table.index_select(0, ids),
    "two axes": lambda table, ids: table[ids[:, None]].squeeze(1),
    "embedding": lambda table, ids: F.embedding(ids, table),
}


@pytest.mark.parametrize("name", ROWS)
def test_trap_19_rows_that_an_argument_chooses_for_each_sample(name: str) -> None:
    """Each sample has rows of its own, and as many scores as there are samples: the argument shows where they are."""

    def forward(m: Any, ids: Tensor) -> Tensor:
        return F.normalize(ROWS[name](m.users, ids), dim=1) @ F.normalize(m.items, dim=1).T

    model, ids = made(forward, users=free(7, 3), items=free(N, 3)), torch.randperm(7)[:N]
    assert_exact(model, ids, steps=3)


# Models that mix their samples, where the first axis of the outputs is that of the samples all the same


def pairs(m: Any, x: Tensor) -> Tensor:
    """What each sample makes of each other one, ``[n, n, 3]``."""
    return (x.expand(len(x), -1, -1) @ m.v + x[:, None].expand(-1, len(x), -1) @ m.w).tanh()


MIXING: dict[str, Callable[[], nn.Module]] = {
    "pairs": lambda: made(pairs, v=free(4, 3), w=free(4, 3)),
    "products of pairs": lambda: made(lambda m, x: (x @ m.w) @ x.T, w=free(4, 4)),
    "a skip": lambda: made(
        lambda m, x: m.a(x).tanh().mean(0).expand(len(x), -1)[:, None] + m.b(x)[:, :, None] * torch.ones(4).double(),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, N),
    ),
}


def rows_alone(model: nn.Module, x: Tensor) -> Tensor:
    """The trace by the gradient of each index on the first axis of the outputs."""
    losses = [squares(row) for row in model(x)]
    found = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True, allow_unused=True) for one in losses]
    return torch.stack([g.square().sum() for row in found for g in row if g is not None]).sum()


@pytest.mark.parametrize("name", MIXING)
def test_trap_19_one_thing_that_takes_single_samples_settles_it(name: str) -> None:
    model = MIXING[name]()
    x = batch((4,), name)
    with FisherMonitor(model, "sum") as monitor:
        squares(model(x)).backward()
    expected = rows_alone(model, x)
    assert_equal(monitor.trace, expected, expected, torch.float64)


def test_trap_19_a_mask_of_as_many_steps_as_samples_counts_none() -> None:
    """What the model makes of its samples is not seen here, and all of them share the mask."""

    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        h = x + m.positions
        return ((h @ h.mT).tanh() * mask) @ h @ m.w

    model = made(forward, positions=free(N, 4), w=free(4, 3))
    x, mask = batch((N, 4), ""), torch.ones(N, N).double().tril() / 2
    with FisherMonitor(model, "sum") as monitor:
        squares(model(x, mask)).backward()
    losses = [squares(model(x[i : i + 1], mask)) for i in range(N)]
    rows = [torch.autograd.grad(one, list(model.parameters())) for one in losses]
    expected = torch.stack([g.square().sum() for row in rows for g in row]).sum()
    assert_equal(monitor.trace, expected, expected, torch.float64)


# When it is looked for


def test_trap_19_samples_of_arguments_are_looked_for_in_looks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    looks: list[int] = []
    whole = samples_in_data.labels_in

    def labels_in(*args: Any) -> Any:
        looks.append(len(steps))
        return whole(*args)

    monkeypatch.setattr(samples_in_data, "labels_in", labels_in)
    model, shape = BEHIND["an ensemble of layers"](N)
    with FisherMonitor(model, "sum"):
        for step in range(1, 18):
            steps.append(step)
            squares(model(batch(shape, ""))).backward()
    assert looks == [1, 2, 3, 5, 9, 17]


def test_trap_19_equal_samples_tell_by_their_places_in_memory() -> None:
    model, shape = IN_FRONT["bmm of an expanded view"](N)
    with expectation(r"batch_axis={'outputs': 1}"), FisherMonitor(model, "sum"):
        squares(model(torch.ones(N, *shape).double())).backward()
    ordinary, shape = BEHIND["an ensemble of layers"](N)
    assert_exact(ordinary, torch.ones(N, *shape).double())


def test_trap_19_a_batch_that_tells_nothing_is_followed_by_one_that_does() -> None:
    model, shape = IN_FRONT["bmm of a stack"](N)
    with FisherMonitor(model, "sum"), suppress(CurvatureError):
        squares(model(torch.ones(N, *shape).double())).backward()
    with FisherMonitor(model, "sum"):
        for _ in range(4):
            with expectation(r"batch_axis={'outputs': 1}"):
                squares(model(batch(shape, ""))).backward()


def test_trap_19_an_argument_that_requires_a_gradient() -> None:
    model, shape = IN_FRONT["bmm of an expanded view"](N)
    with expectation(r"batch_axis={'outputs': 1}"), FisherMonitor(model, "sum"):
        squares(model(batch(shape, "").requires_grad_())).backward()


@pytest.mark.parametrize("way", ["by name", "in a mapping", "on axis 1"])
def test_trap_19_however_the_argument_is_given(way: str) -> None:
    w = free(N, 4, 3)
    words: dict[str, Any] = {}
    x = batch((4,), "")
    if way == "in a mapping":
        model, given = made(lambda m, batch: torch.bmm(batch["x"].expand(N, -1, -1), m.w).tanh(), w=w), ({"x": x},)
    elif way == "on axis 1":
        model, given = made(lambda m, x: torch.bmm(x.T.expand(N, -1, -1), m.w).tanh(), w=w), (x.T.contiguous(),)
        words = {"batch_axis": {"inputs": 1}}
    else:
        model, given = made(lambda m, x: torch.bmm(x.expand(N, -1, -1), m.w).tanh(), w=w), (x,)
    with expectation(r"batch_axis={'outputs': 1}"), FisherMonitor(model, "sum", **words):
        outputs = model(x=given[0]) if way == "by name" else model(*given)
        squares(outputs).backward()


@pytest.mark.parametrize("way", ["a report without checks", "the user's word"])
def test_trap_19_what_others_believed_is_asked_in_a_block_to_which_nothing_is_said(way: str) -> None:
    inner, x = UNSHOWN_STEPS["frozen features"](), torch.randn(N, N, 4).double()
    model = Forward(lambda m, x: m.inner(x).transpose(0, 1), inner=inner)
    for _ in range(3):  # Then it is no graph's turn to be examined.
        if way == "the user's word":
            with FisherMonitor(model, "sum", batch_axis={"outputs": 0}):
                squares(model(x)).backward()
        else:
            words: dict[str, Any] = {"reduction": "sum", "progress": False, "verify": False}
            fisher_report(model, lambda o, t: squares(o), (x, None), **words)
    with FisherMonitor(model, "sum") as monitor:
        for _ in range(3):
            with expectation(r"may be on axis 0 or on axis 1 of an output"):
                squares(model(x)).backward()
    assert monitor.n_samples == 0
