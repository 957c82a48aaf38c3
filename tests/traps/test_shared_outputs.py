"""Trap 31: numbers beside the trace. Here, activation traces of modules whose output all samples share, and shared outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expectations import expectation
from oracles import assert_equal
from problems._base import Forward
from torch_secorder import FisherMonitor, fisher_report, fisher_results
from torch_secorder.errors import CoverageError, CurvatureError, UnsupportedError
from traps.test_crashes import Holding

T = 5


def positions(m: Any, x: Tensor) -> Tensor:
    return m.h(m.e(x) + m.p(torch.arange(T)))


def positions_through_modules(m: Any, x: Tensor) -> Tensor:
    return m.h((m.e(x) * m.act(m.p(torch.arange(T)))).tanh())


def used_twice(m: Any, x: Tensor) -> Tensor:
    p = m.p(torch.arange(T))
    return m.h(m.act(m.e(x) + p) * p.T.mean())


def table_called_twice(m: Any, x: Tensor) -> Tensor:
    return m.h(m.e(x) * m.p(torch.arange(T)) + m.p(torch.arange(1, T + 1) % T))


def steps_first(m: Any, x: Tensor) -> Tensor:
    return m.h(m.act(m.e(x.T) + m.p(torch.arange(T))[:, None])).transpose(0, 1)


def inside_of_a_block(m: Any, x: Tensor) -> Tensor:
    return m.h(m.e(x) + m.block(torch.arange(T)))


def network_on_positions(m: Any, x: Tensor) -> Tensor:
    return m.h(m.e(x) + m.net(torch.linspace(-1, 1, 2 * T, dtype=torch.float64).view(T, 2)))


def network_and_its_first_layer(m: Any, x: Tensor) -> Tensor:
    first = m.net[0](torch.linspace(-1, 1, 2 * T, dtype=torch.float64).view(T, 2))
    return m.h((m.e(x) + m.net[2](m.net[1](first))) * first[:, :4].sigmoid())


def network_whose_units_are_dead(m: Any, x: Tensor) -> Tensor:
    """What lies behind the dead units has no gradient that would lead to it."""
    return m.h(m.e(x) + m.net[2]((m.net[0](torch.ones(T, 2, dtype=torch.float64)) - 100).relu()))


class Bias(nn.Module):
    """A module that returns a parameter of its own, made smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self) -> Tensor:
        return self.weight.tanh()


def from_a_bias(m: Any, x: Tensor) -> Tensor:
    return m.h(m.e(x) + m.b())


def layer_on_data_and_on_a_weight(m: Any, x: Tensor) -> Tensor:
    """The data needs no gradient, so that nothing but the layer's parameters is seen behind the samples' own output."""
    h = m.act(m.l(torch.stack([x, x.square(), -x, 1 - x], 2).to(m.p.weight.dtype) / 7))
    mixed = torch.einsum("lbtd,sd->slbt", torch.stack([h, h.tanh()]), m.l(m.p.weight[:4])).sum(1)
    return m.h(h.tanh() + mixed.permute(1, 2, 0))


def models() -> dict[str, nn.Module]:
    def parts() -> dict[str, nn.Module]:
        return {"e": nn.Embedding(7, 4), "p": nn.Embedding(T, 4), "h": nn.Linear(4, 7), "act": nn.Tanh()}

    forwards = (positions, positions_through_modules, used_twice, table_called_twice, steps_first)
    found: dict[str, nn.Module] = {forward.__name__: Forward(forward, **parts()) for forward in forwards}
    for forward in (network_on_positions, network_and_its_first_layer, network_whose_units_are_dead):
        net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4))
        found[forward.__name__] = Forward(forward, e=nn.Embedding(7, 4), h=nn.Linear(4, 7), net=net)
    block = nn.Sequential(nn.Embedding(T, 4), nn.Tanh())
    found["inside_of_a_block"] = Forward(inside_of_a_block, e=nn.Embedding(7, 4), h=nn.Linear(4, 7), block=block)
    found["layer_on_data_and_on_a_weight"] = Forward(layer_on_data_and_on_a_weight, l=nn.Linear(4, 4), **parts())
    found["from_a_bias"] = Holding(from_a_bias, parameters={}, e=nn.Embedding(7, 4), h=nn.Linear(4, 7), b=Bias())
    return found


def one_by_one(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Module name -> the squared norm of each sample's gradient in all outputs of its calls, from a loop over samples."""
    found: dict[str, list[Tensor]] = {}
    for inputs, target in zip(x, y, strict=True):
        seen: list[tuple[str, Tensor]] = []
        handles = [
            module.register_forward_hook(lambda _, args, output, name=name, seen=seen: seen.append((name, output)))
            for name, module in model.named_modules()
        ]
        loss = F.cross_entropy(model(inputs[None]).mT, target[None])
        for handle in handles:
            handle.remove()
        grads = torch.autograd.grad(loss, [output for _, output in seen], allow_unused=True)
        sums: dict[str, Tensor] = {}
        for (name, _), grad in zip(seen, grads, strict=True):
            if grad is not None:
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + grad.square().sum()
        for name, value in sums.items():
            found.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in found.items()}


def monitored(model: nn.Module, batches: list[tuple[Tensor, Tensor]], **words: Any) -> Any:
    with FisherMonitor(model, activations=True, **words) as monitor:
        for x, y in batches:
            F.cross_entropy(model(x).mT, y).backward()
    return monitor.activations["activation_trace"]


def reported(model: nn.Module, batches: list[tuple[Tensor, Tensor]], **words: Any) -> Any:
    results = fisher_results(
        model, lambda outputs, y: F.cross_entropy(outputs.mT, y), batches, activations=True, progress=False, **words
    )
    return results.activations["activation_trace"]


@pytest.mark.filterwarnings("ignore::torch_secorder.errors.SlowFallbackWarning")
@pytest.mark.parametrize("sizes", [(T,), (1,), (3,), (T, 3, 1)], ids=str)
@pytest.mark.parametrize("way", [monitored, reported], ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", models())
def test_trap_31_outputs_that_all_samples_share(name: str, way: Callable[..., Any], sizes: tuple[int, ...]) -> None:
    """Batches of as many samples as there are positions, of fewer and of one belong to one table."""
    model = models()[name].double()
    batches = [(torch.randint(7, (n, T)), torch.randint(7, (n, T))) for n in sizes]
    each = [one_by_one(model, *batch) for batch in batches]
    # A monitor is told that samples come first, where there are as many steps of data that nothing follows.
    words = {"batch_axis": {"outputs": 0}} if name == "layer_on_data_and_on_a_weight" else {}
    found = way(model, batches, **words)
    assert set(found.index) == set(each[0])
    for module in each[0]:
        expected = torch.cat([one[module] for one in each]).mean()
        assert_equal(torch.tensor(found[module]), expected, expected)


@pytest.mark.parametrize("name", ["positions", "network_on_positions"])
def test_trap_31_outputs_that_all_samples_share_and_no_analyzed_parameter_leads_to(name: str) -> None:
    """Nothing climbs from a parameter that is not analyzed; what it leads to is seen, refused, and the remedy is right."""
    model = models()[name].double()
    x, y = torch.randint(7, (T, T)), torch.randint(7, (T, T))
    options: dict[str, Any] = {"activations": True, "parameters": ["h.*"]}
    remedy = r"all samples share its output.*parameters=\"trainable\""
    with pytest.raises(UnsupportedError, match=remedy), FisherMonitor(model, **options):
        F.cross_entropy(model(x).mT, y).backward()
    expected = one_by_one(model, x, y)
    # A report computes no gradient of the others.
    results = fisher_results(model, lambda out, y: F.cross_entropy(out.mT, y), (x, y), progress=False, **options)
    for found in (monitored(model, [(x, y)]), results.activations["activation_trace"]):
        for module, trace in found.items():
            assert_equal(torch.tensor(trace), expected[module].mean(), expected[module].mean())
    assert set(results.activations.index) == {"", "h"}


def test_trap_31_outputs_with_samples_need_no_analyzed_parameter() -> None:
    model = Forward(lambda m, x: m.h(m.act(m.e(x))), e=nn.Embedding(7, 4), act=nn.Tanh(), h=nn.Linear(4, 7)).double()
    x, y = torch.randint(7, (T, T)), torch.randint(7, (T, T))
    with FisherMonitor(model, activations=True, parameters=["h.*"]) as monitor:
        F.cross_entropy(model(x).mT, y).backward()
    for module, squares in one_by_one(model, x, y).items():
        assert_equal(torch.tensor(monitor.activations["activation_trace"][module]), squares.mean(), squares.mean())


class Infinite(torch.autograd.Function):
    """The gradient becomes infinite for the first sample, once that is wanted."""

    factor = 1.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return torch.cat([grads[0][:1] * Infinite.factor, grads[0][1:]])


def test_trap_31_a_sample_that_is_left_out_is_left_out_of_all_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is infinite in the first layer's output only, and looks like any other in the second's."""
    model = Forward(lambda m, x: m.second(Infinite.apply(m.first(x))), first=nn.Linear(4, 4), second=nn.Linear(4, 3))
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    alone = []
    for rows in (slice(0, 5), slice(1, 5)):
        twin = copy.deepcopy(model)  # nothing is known of the model itself before
        with FisherMonitor(twin, activations=True) as monitor:
            F.cross_entropy(twin(x[rows]), y[rows]).backward()
        alone.append(monitor.activations["activation_trace"])
    with FisherMonitor(model, activations=True, nonfinite="skip") as monitor:
        for factor in (1.0, 1.0, 1.0, torch.inf):  # in the fourth pass nobody looks for samples
            monkeypatch.setattr(Infinite, "factor", factor)
            F.cross_entropy(model(x), y).backward()
    assert monitor.n_samples == 19
    for name, found in monitor.activations["activation_trace"].items():
        expected = torch.tensor((15 * alone[0][name] + 4 * alone[1][name]) / 19)
        assert_equal(torch.tensor(found), expected, expected, torch.float32)


class Variance(nn.Module):
    """A model with a learned variance, which it returns as it is, for each sample, or not at all."""

    def __init__(self, returns: str):
        super().__init__()
        self.mean, self.log_variance, self.returns = nn.Linear(4, 3), nn.Parameter(torch.randn(3)), returns

    def forward(self, x: Tensor) -> Any:
        mean, v = self.mean(x), self.log_variance
        return {"mean only": mean, "as it is": (mean, v), "expanded": (mean, v.expand(len(x), -1))}[self.returns]


def likelihoods(mean: Tensor, log_variance: Tensor, y: Tensor) -> Tensor:
    return ((mean - y).square() * (-log_variance).exp() + log_variance).sum(1)


@pytest.mark.parametrize("returns", ["mean only", "as it is"])
def test_trap_31_a_parameter_that_the_loss_takes_itself(returns: str) -> None:
    """It is refused, and exact once the model returns the parameter for each sample."""
    model, x, y = Variance(returns).double(), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    with pytest.raises(CoverageError, match=r"log_variance.*p.expand\(n, -1\)"), FisherMonitor(model):
        outputs = model(x)
        mean = outputs if returns == "mean only" else outputs[0]
        likelihoods(mean, model.log_variance, y).mean().backward()
    model.returns = "expanded"
    with FisherMonitor(model) as monitor:
        likelihoods(*model(x), y).mean().backward()
    assert_exact_traces(model, monitor, lambda n: likelihoods(*model(x[n : n + 1]), y[n : n + 1]).sum())


class Flow(nn.Module):
    """A normalizing flow, whose log-determinant is the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.rotation, self.head, self.expands = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = x @ self.rotation
        log_determinant = torch.linalg.slogdet(self.rotation)[1]
        return z + self.head(z).tanh(), log_determinant.expand(len(x)) if self.expands else log_determinant


def test_trap_31_an_output_without_samples_that_the_loss_takes() -> None:
    """It is refused, and exact once it is expanded."""
    model, x = Flow().double(), torch.randn(5, 4).double()

    def loss(outputs: tuple[Tensor, Tensor], _: Any = None) -> Tensor:
        return (outputs[0].square().sum(1) - outputs[1]).mean()

    with pytest.raises(CurvatureError, match=r"x\.expand\(n"), FisherMonitor(model):
        loss(model(x)).backward()
    with pytest.raises(CurvatureError, match=r"x\.expand\(n"):
        fisher_report(model, loss, (x, torch.zeros(5)), progress=False)
    model.expands = True
    with FisherMonitor(model) as monitor:
        loss(model(x)).backward()
    assert_exact_traces(model, monitor, lambda n: loss(model(x[n : n + 1])))


def log_variance(m: Any, x: Tensor) -> Tensor:
    return m.mean.bias.exp()


def variance_with_a_floor(m: Any, x: Tensor) -> Tensor:
    return F.softplus(m.raw) + 0.01


def projected_rows(m: Any, x: Tensor) -> Tensor:
    return F.normalize(m.project(m.rows), dim=1)[:, 0].square() + 1


def rows_of_a_table(m: Any, x: Tensor) -> Tensor:
    return m.project(m.table(torch.arange(3, device=x.device))).square().sum(1) + 1


def sums_that_branch(m: Any, x: Tensor) -> Tensor:
    found = m.raw
    for _ in range(40):  # a graph with as many ways as 2 ** 40
        found = found.tanh() + found
    return found.exp()


MAKERS = (log_variance, variance_with_a_floor, projected_rows, rows_of_a_table, sums_that_branch)
SHARED_ROWS = {one.__name__: one for one in MAKERS}


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("name", SHARED_ROWS)
def test_trap_31_an_output_of_parameters_alone_with_as_many_rows_as_samples(name: str, n: int) -> None:
    """As many variances as samples are those of all samples all the same; each sample's own copies are exact."""
    expands = False

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, shared = m.mean(x), SHARED_ROWS[name](m, x)
        return mean, shared.expand_as(mean) if expands else shared

    def loss(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return likelihoods(outputs[0], outputs[1].log(), y).mean()

    parts = {"mean": nn.Linear(4, 3), "project": nn.Linear(2, 2), "table": nn.Embedding(3, 2)}
    parameters = {"raw": nn.Parameter(torch.randn(3)), "rows": nn.Parameter(torch.randn(3, 2))}
    model = Holding(forward, parameters=parameters, **parts).double()
    x, y = torch.randn(n, 4).double(), torch.randn(n, 3).double()
    with expectation(r"return it once for each sample, as x\.expand"), FisherMonitor(model):
        loss(model(x), y).backward()
    with FisherMonitor(model) as monitor:  # if the loss does not take it, nobody needs to know
        (model(x)[0] - y).square().sum(1).mean().backward()
    assert monitor.n_samples == n
    expands = True
    with FisherMonitor(model) as monitor:
        loss(model(x), y).backward()
    assert_exact_traces(model, monitor, lambda i: loss(model(x[i : i + 1]), y[i : i + 1]))


@pytest.mark.parametrize("said", [False, True])
def test_trap_31_layers_that_only_an_output_without_samples_leads_to(said: bool) -> None:
    """Layers on as many rows as there are samples, which shapes take for theirs: of a table in turn, or as the user says."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([[3, 1], [2, 2], [0, 5]] if said else [[0, 1], [2, 3], [4, 5]], device=x.device)
        prompts = m.table(ids.flatten()).view(3, 4)
        prototypes = m.project(prompts)
        return m.features(x), prototypes.expand(len(x), -1, -1) if expands else prototypes

    def loss(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        features, prototypes = outputs
        return F.cross_entropy(-(features[:, None] - prototypes).square().sum(2), y)

    expands, words = False, {"batch_axis": {"outputs": {1: None}}} if said else {}
    parts = {"features": nn.Linear(4, 2), "table": nn.Embedding(6, 2), "project": nn.Linear(4, 2)}
    model, x, y = Holding(forward, parameters={}, **parts).double(), torch.randn(3, 4).double(), torch.tensor([0, 1, 2])
    with expectation(r"return it once for each sample, as x\.expand"), FisherMonitor(model, **words) as monitor:
        loss(model(x), y).backward()
    assert monitor.n_samples == 0
    expands = True
    # As many rows of the model's own data as samples may be the samples' own, in front of steps.
    words = {"batch_axis": {"outputs": {1: 0}}} if said else {}
    with FisherMonitor(model, **words) as monitor:
        loss(model(x), y).backward()
    assert_exact_traces(model, monitor, lambda i: loss(model(x[i : i + 1]), y[i : i + 1]))


def test_trap_31_codes_that_an_argument_chooses_in_order_are_those_of_samples() -> None:
    """Each sample has a code of its own, by numbers that the model is given."""
    model = Holding(
        lambda m, ids: (m.decode(codes := m.table(ids)), codes),
        parameters={},
        decode=nn.Linear(2, 4),
        table=nn.Embedding(3, 2),
    ).double()
    ids, y = torch.arange(3), torch.randn(3, 4).double()

    def loss(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return ((outputs[0] - y).square().sum(1) + outputs[1].square().sum(1)).mean()

    with FisherMonitor(model) as monitor:
        loss(model(ids), y).backward()
    assert_exact_traces(model, monitor, lambda i: loss(model(ids[i : i + 1]), y[i : i + 1]))


def assert_exact_traces(model: nn.Module, monitor: FisherMonitor, alone: Callable[[int], Tensor]) -> None:
    named = list(model.parameters())
    rows = [
        torch.autograd.grad(alone(n), named, allow_unused=True, materialize_grads=True)
        for n in range(monitor.n_samples)
    ]
    traces = [torch.stack(g).square().sum() / len(rows) for g in zip(*rows, strict=True)]
    for (name, _), t in zip(model.named_parameters(), traces, strict=True):
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), t, monitor.trace, torch.float64)


@pytest.mark.parametrize("gate", [0.0, 1.0])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_trap_31_an_output_behind_a_gate_by_which_data_comes_in(gate: float, frozen: bool, masked: bool) -> None:
    """No gradient may reach the parameter by which data came in, and another use of the output is a product with no batch.

    If a sample's part of it has no gradient, nothing shows whether it is that sample's, and activation traces are refused.
    """

    def gated(m: Any, h: Tensor) -> Tensor:
        return h + m.g * (h @ m.w)

    def stacked(m: Any, h: Tensor) -> Tensor:
        return torch.einsum("lbtd,sd->slbt", torch.stack([h, h.tanh()]), m.l(m.w)).sum(1).permute(1, 2, 0)

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        return m.head(m.second(h.tanh() + m.between(h)) * mask)

    first, second = Forward(gated), Forward(stacked, l=nn.Linear(6, 6))
    first.g = nn.Parameter(torch.tensor(gate), requires_grad=not frozen)
    first.w = nn.Parameter(torch.randn(6, 6))
    second.w = nn.Parameter(torch.randn(6, 6), requires_grad=False)
    second.l.weight.requires_grad_(False)
    model = Forward(forward, first=first, between=nn.Linear(6, 6), second=second, head=nn.Linear(6, 3)).to(
        torch.float64
    )
    x, y = torch.randn(4, 2, 6, dtype=torch.float64), torch.randint(0, 3, (4, 2))
    mask = torch.ones(4, 1, 1, dtype=torch.float64)
    mask[1] -= int(masked)

    def loss() -> Tensor:
        return F.cross_entropy(model(x).mT, y)

    outputs: list[Tensor] = []
    with first.register_forward_hook(lambda module, args, output: outputs.append(output)):
        (gradient,) = torch.autograd.grad(loss(), outputs)
    if frozen and masked and not gate:
        remedy = "whether data takes part in it or all samples share it: leave out activations=True"
        with pytest.raises(UnsupportedError, match=remedy), FisherMonitor(model, activations=True):
            loss().backward()
        with FisherMonitor(model) as monitor:
            loss().backward()
        shares = F.cross_entropy(model(x).mT, y, reduction="none").mean(1)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rows = [torch.autograd.grad(share, list(named.values()), retain_graph=True) for share in shares]
        for name, grads in zip(named, zip(*rows, strict=True), strict=True):
            trace = torch.stack(grads).square().sum() / 4
            assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), trace, monitor.trace)
        return
    with FisherMonitor(model, activations=True) as monitor:
        loss().backward()
    trace = 4 * gradient.square().sum()  # Each entry is one sample's share of the mean.
    found = torch.tensor(monitor.activations.loc["first", "activation_trace"], dtype=torch.float64)
    assert_equal(found, trace, trace)


def of_constants(m: Any, h: Tensor) -> Tensor:
    return m.table + m.gate * (m.table @ m.w)


def of_parameters(m: Any, h: Tensor) -> Tensor:
    return m.p.tanh() + m.gate * (m.p @ m.w)


def of_a_layer_on_constants(m: Any, h: Tensor) -> Tensor:
    return m.table + m.gate * m.l(m.table)


def of_data(m: Any, h: Tensor) -> Tensor:
    return h.detach() + m.gate * (h.detach() @ m.w)


@pytest.mark.parametrize("n", [1, 3, T])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("inside", [of_constants, of_parameters, of_a_layer_on_constants, of_data])
def test_trap_31_an_output_with_a_closed_gate(inside: Callable[[Any, Tensor], Tensor], frozen: bool, n: int) -> None:
    """All samples share it or not, which is searched for; if nothing that gets a gradient is behind it, it is refused."""
    part = Forward(inside, l=nn.Linear(4, 4)).double()
    part.gate = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=not frozen)
    part.w, part.p = (nn.Parameter(torch.randn(size, 4, dtype=torch.float64)) for size in (4, T))
    part.register_buffer("table", torch.randn(T, 4, dtype=torch.float64))
    own = {"e": nn.Embedding(7, 4).double(), "part": part, "h": nn.Linear(4, 7).double()}

    def forward(m: Any, x: Tensor) -> Tensor:
        e = m.e(x)
        return m.h((e * m.part(e)).tanh())

    model = Forward(forward, **own)
    x, y = torch.randint(7, (n, T)), torch.randint(7, (n, T))
    expected = one_by_one(model, x, y)["part"].mean()
    if frozen and n > 1 and inside in (of_constants, of_a_layer_on_constants):
        remedy = "get no gradient through it, as behind a closed gate.*begin at small numbers, or leave out"
        with pytest.raises(UnsupportedError, match=remedy), FisherMonitor(model, activations=True):
            F.cross_entropy(model(x).mT, y).backward()
        part.gate.data.fill_(1e-3)
        expected = one_by_one(model, x, y)["part"].mean()
    assert_equal(torch.tensor(monitored(model, [(x, y)])["part"]), expected, expected)


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [0, 1, 1]])
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("read", [lambda table: table.mean(0), lambda table: table.tanh()[:1], lambda table: table])
def test_trap_31_a_table_that_weights_of_zero_read(
    read: Callable[[Tensor], Tensor], weight: float, rows: list[int]
) -> None:
    """Each sample reads a row of its own, and weights of zero, which take the table for all of them, bring it no gradient."""

    def forward(m: Any, x: Tensor) -> Tensor:
        table = m.rows(m.data)
        return m.out(table[x] + m.all(read(table)).sum(0))

    model = Forward(forward, rows=nn.Linear(4, 4), all=nn.Linear(4, 4), out=nn.Linear(4, 4)).double()
    model.register_buffer("data", torch.randn(3, 4, dtype=torch.float64))
    model.all.weight.data *= weight
    x, y = torch.tensor(rows)[:, None], torch.randint(4, (3, 1))
    if weight == 0 and len(set(rows)) == 3:
        remedy = "weights of zero, so that nothing brings.*begin at small numbers, or leave out activations=True"
        with pytest.raises(UnsupportedError, match=remedy), FisherMonitor(model, activations=True):
            F.cross_entropy(model(x).mT, y).backward()
        model.all.weight.data.fill_(1e-3)
    expected = one_by_one(model, x, y)["all"].mean()
    assert_equal(torch.tensor(monitored(model, [(x, y)])["all"]), expected, expected)
