"""Which backward passes count: those that compute a gradient of an analyzed parameter, whatever else is differentiated inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model_state import assert_same_gradients, gradients, hooks
from monitor.classifier import assert_report, batch, classifier, cross_entropy, norms
from oracles import assert_equal, per_sample_squared_norms, total, trace
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report
from torch_secorder.errors import CoverageError, CurvatureError, LifecycleError, UnsupportedError
from torch_secorder.pruning import Gates
from torch_secorder.recording.accumulator import PassAccumulator

Step = Callable[[nn.Module, Tensor, Tensor], object]


def without_and_with(model: nn.Module, step: Callable[[nn.Module], object], **options: Any) -> FisherMonitor:
    """A monitor that watched the step, whose gradients and results are those of the step without it."""
    twin = copy.deepcopy(model)
    expected = step(twin)
    with FisherMonitor(model, **options) as monitor:
        found = step(model)
    assert_same_gradients(gradients(model), gradients(twin))
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    assert not any(hooks(model).values())
    return monitor


def assert_refused(
    model: nn.Module, step: Callable[[nn.Module], object], error: type[Exception], match: str, **options: Any
) -> None:
    """The step is refused, and its gradients are those of the step without a monitor."""
    twin = copy.deepcopy(model)
    step(twin)
    with pytest.raises(error, match=match), FisherMonitor(model, **options):
        step(model)
    assert_same_gradients(gradients(model), gradients(twin))
    assert not any(hooks(model).values())
    with pytest.warns(UserWarning, match=match), FisherMonitor(twin, on_refusal="skip", **options) as monitor:
        twin.zero_grad()
        step(twin)
    assert_same_gradients(gradients(twin), gradients(model))
    assert monitor.results.statistics.skipped_passes == 1
    assert monitor.n_samples == 0


# Gradients of inputs


def saliency(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    z = x.clone().requires_grad_()
    return torch.autograd.grad(model(z).max(1).values.sum(), z, **options)[0]


def after(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    cross_entropy()(model(x), y).backward()
    return saliency(model, x)


def before(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    found = saliency(model, x)
    cross_entropy()(model(x), y).backward()
    return found


def of_the_same_forward_before(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = x.clone().requires_grad_()
    out = model(z)
    found = torch.autograd.grad(out.sum(), z, retain_graph=True)[0]
    cross_entropy()(out, y).backward()
    return found


def of_the_same_forward_after(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = x.clone().requires_grad_()
    out = model(z)
    cross_entropy()(out, y).backward(retain_graph=True)
    return torch.autograd.grad(out.sum(), z)[0]


def by_backward_with_inputs(model: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
    z = x.clone().requires_grad_()
    model(z).sum().backward(inputs=[z])
    cross_entropy()(model(x), y).backward()
    return z.grad


def with_a_graph_that_nobody_uses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = x.clone().requires_grad_()
    out = model(z)
    found = torch.autograd.grad(out.sum(), z, create_graph=True)[0]
    cross_entropy()(out, y).backward()
    return found.detach()


def inside_of_a_hook(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    found = []

    def hook(grad: Tensor) -> None:
        with torch.enable_grad():
            found.extend(saliency(model, x) for _ in range(3))

    out = model(x)
    out.register_hook(hook)
    cross_entropy()(out, y).backward()
    return torch.stack(found)


def under_vmap(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = x.clone().requires_grad_()
    out = model(z)
    found = torch.autograd.grad(out.sum(0), z, torch.eye(3, dtype=out.dtype), retain_graph=True, is_grads_batched=True)
    vectors = torch.eye(3, dtype=out.dtype)
    again = torch.func.vmap(lambda v: torch.autograd.grad(out.sum(0), z, v, retain_graph=True)[0])(vectors)
    cross_entropy()(out, y).backward()
    return torch.cat([found[0], again])


def adversarial(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Of the perturbed inputs, which the caller knows: the attack is a step of zero length."""
    z = x.clone().requires_grad_()
    step = torch.autograd.grad(cross_entropy()(model(z), y), z)[0].sign()
    cross_entropy()(model(x + 0 * step), y).backward()


INPUT_GRADIENTS = [
    *(after, before, of_the_same_forward_before, of_the_same_forward_after, by_backward_with_inputs),
    *(with_a_graph_that_nobody_uses, inside_of_a_hook, under_vmap, adversarial),
]


@pytest.mark.parametrize("options", [{}, {"repeated_calls": "new"}, {"parameters": "all"}], ids=str)
@pytest.mark.parametrize("step", INPUT_GRADIENTS)
def test_gradients_of_inputs_are_no_samples(step: Step, options: dict[str, Any]) -> None:
    model, (x, y) = classifier(), batch()
    monitor = without_and_with(model, lambda m: step(m, x, y), **options)
    assert_report(monitor, norms(model, (x, y)))


def test_a_block_with_gradients_of_inputs_only_has_no_samples() -> None:
    model, (x, _) = classifier(), batch()
    monitor = without_and_with(model, lambda m: saliency(m, x))
    with pytest.raises(LifecycleError, match="no sample was seen yet"):
        monitor.report()


class Equilibrium(nn.Module):
    """z = tanh(a(z) + b(x)), whose backward pass solves for its gradient in a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        with torch.no_grad():
            self.a.weight /= 4

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        return (self.a(z) + self.b(x)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(60):
                z = self.f(z, x)
        z = self.f(z, x)
        if z.requires_grad:
            start = z.detach().requires_grad_()
            again = self.f(start, x)

            def solved(grad: Tensor) -> Tensor:
                g = grad
                for _ in range(60):
                    g = grad + torch.autograd.grad(again, start, g, retain_graph=True)[0]
                return g

            z.register_hook(solved)
        return self.head(z)


def test_an_equilibrium_whose_hook_runs_many_passes_is_exact() -> None:
    model, (x, y) = Equilibrium().double(), batch()
    monitor = without_and_with(model, lambda m: cross_entropy()(m(x), y).backward())
    assert_report(monitor, per_sample_squared_norms(model, cross_entropy(), x, y))


def test_an_equilibrium_whose_hook_runs_passes_inside_of_the_librarys_is_exact() -> None:
    """Those passes go through calls of layers that no output was computed from, and ask for no gradient of a parameter."""
    model, (x, y) = Equilibrium().double(), batch()
    expected = per_sample_squared_norms(model, cross_entropy(), x, y)
    everything = sum(t.mean() for t in expected.values())
    table = fisher_report(model, cross_entropy(), (x, y), progress=False)
    for name, t in expected.items():
        assert_equal(torch.tensor(table.loc[name, "fisher_trace"]), t.mean(), everything, torch.float64)
    assert_equal(empirical_fisher_trace(model, cross_entropy(), x, y), everything, everything)


# Derivatives of gradients


def through_the_models_outputs(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """A penalty on the gradient of the outputs: what is differentiated twice is the loss, and not the model."""
    out = model(x)
    loss = cross_entropy()(out, y)
    (g,) = torch.autograd.grad(loss, out, create_graph=True)
    (loss + g.square().sum(1).mean()).backward()


def test_a_penalty_on_the_gradient_of_the_outputs_is_exact() -> None:
    model, (x, y) = classifier(), batch()
    monitor = without_and_with(model, lambda m: through_the_models_outputs(m, x, y))
    expected = {name: torch.zeros(5, dtype=torch.float64) for name, _ in model.named_parameters()}
    for n in range(5):
        out = model(x)
        loss = F.cross_entropy(out, y, reduction="none")
        (g,) = torch.autograd.grad(loss.mean(), out, create_graph=True)
        own = torch.autograd.grad((loss + g.square().sum(1))[n], list(model.parameters()))
        for name, grad in zip(expected, own, strict=True):
            expected[name][n] = grad.square().sum()
    assert_report(monitor, expected)


def r1_penalty(model: nn.Module, x: Tensor, y: Tensor) -> None:
    z = x.clone().requires_grad_()
    out = model(z)
    (g,) = torch.autograd.grad(out.sum(), z, create_graph=True)
    (cross_entropy()(out, y) + 1e-9 * g.square().sum(1).mean()).backward()


def forces(model: nn.Module, x: Tensor, y: Tensor) -> None:
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(z).sum(), z, create_graph=True)
    g.square().sum(1).mean().backward()


def through_a_hidden_layer(model: nn.Module, x: Tensor, y: Tensor) -> None:
    h = model[0](x)
    out = model[2](model[1](h))
    (g,) = torch.autograd.grad(out.sum(), h, create_graph=True)
    (cross_entropy()(out, y) + g.square().sum(1).mean()).backward()


@pytest.mark.parametrize("watched", [0, 1, 4], ids="after {} passes".format)
@pytest.mark.parametrize("step", [r1_penalty, forces])
def test_a_pass_through_the_graph_of_a_gradient_is_refused(step: Step, watched: int) -> None:
    """However small a part of the loss it is, and whether or not the sums of the pass are checked."""
    model, (x, y), first = classifier(), batch(), batch(3)
    twin = copy.deepcopy(model)
    step(twin, x, y)
    with FisherMonitor(model) as monitor:
        for _ in range(watched):
            cross_entropy()(model(first[0]), first[1]).backward()
        model.zero_grad()
        with pytest.raises(UnsupportedError, match=r"graph of a gradient.*create_graph"):
            step(model, x, y)
    assert_same_gradients(gradients(model), gradients(twin))
    assert monitor.n_samples == 3 * watched


def test_a_pass_through_the_graph_of_a_layers_gradient_is_refused() -> None:
    model, (x, y) = classifier(), batch()
    step, match = (lambda m: through_a_hidden_layer(m, x, y)), "graph of a gradient"
    assert_refused(model, step, UnsupportedError, match, batch_axis=0)


def test_a_layer_alone_whose_gradient_is_differentiated_is_refused() -> None:
    model, (x, y) = nn.Linear(4, 3).double(), batch()
    assert_refused(model, lambda m: forces(m, x, y), CurvatureError, "weight|graph of a gradient")


# Frozen parameters and gates, which have no gradient of their own


@pytest.mark.parametrize("with_input_gradient", [False, True])
def test_frozen_parameters_count_in_backward(with_input_gradient: bool) -> None:
    model, (x, y) = classifier(), batch()
    expected = norms(model, (x, y))
    model.requires_grad_(False)

    with FisherMonitor(model, parameters="all") as monitor:
        saliency(model, x)
        z = x.clone().requires_grad_(with_input_gradient)
        cross_entropy()(model(z), y).backward()
    assert all(p.grad is None for p in model.parameters())
    assert_report(monitor, expected)


def test_gates_count_in_backward_and_where_parameters_are_asked_for() -> None:
    model, (x, y) = classifier(), batch()
    with Gates(model) as alone:
        cross_entropy()(model(x), y).backward()
    with Gates(model) as both:
        saliency(model, x)
        torch.autograd.grad(cross_entropy()(model(x), y), list(model.parameters()))
    assert both.n_samples == alone.n_samples == 5
    for name, values in alone.fisher.items():
        assert torch.equal(both.fisher[name], values)


# Two passes through one forward


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).tanh()
        return self.a(h), self.b(h)


class SeparateHeads(Heads):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x.repeat(1, 2)[:, :5]), self.b(x.repeat(1, 2)[:, 3:])


def of_heads(outputs: tuple[Tensor, Tensor], y: Tensor) -> list[Tensor]:
    return [F.cross_entropy(outputs[0], y), outputs[1].square().mean()]


def one_by_one(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for loss in of_heads(model(x), y):
        loss.backward(retain_graph=True)


@pytest.mark.parametrize("heads", [Heads, SeparateHeads])
def test_two_passes_through_one_forward_are_refused_also_by_different_layers(heads: type[Heads]) -> None:
    model, (x, y) = heads().double(), batch()
    twin = copy.deepcopy(model)
    one_by_one(twin, x, y)
    with FisherMonitor(model) as monitor, pytest.raises(LifecycleError, match=r"add the losses.*autograd\.backward\("):
        one_by_one(model, x, y)
    assert_same_gradients(gradients(model), gradients(twin))
    assert monitor.n_samples == 5


@pytest.mark.parametrize(
    "remedy",
    [lambda losses: sum(losses).backward(), torch.autograd.backward],
    ids=["the sum", "all at once"],
)
@pytest.mark.parametrize("heads", [Heads, SeparateHeads])
def test_the_remedy_for_two_passes_through_one_forward(heads: type[Heads], remedy: Callable[[Any], None]) -> None:
    model, (x, y) = heads().double(), batch()
    monitor = without_and_with(model, lambda m: remedy(of_heads(m(x), y)))
    assert_report(monitor, per_sample_squared_norms(model, lambda out, t: sum(of_heads(out, t)), x, y))


def test_a_pass_for_one_heads_parameters_counts() -> None:
    model, (x, y) = SeparateHeads().double(), batch()
    monitor = without_and_with(model, lambda m: of_heads(m(x), y)[0].backward(inputs=list(m.a.parameters())))
    expected = per_sample_squared_norms(model, lambda out, t: of_heads(out, t)[0], x, y)
    assert_report(monitor, expected)


def test_a_generator_that_one_of_two_passes_reaches_is_exact() -> None:
    generator, discriminator = nn.Linear(4, 4).double(), nn.Linear(4, 1).double()
    z = torch.randn(5, 4, dtype=torch.float64)
    with FisherMonitor(generator) as monitor, FisherMonitor(discriminator) as other:
        fake = generator(z)
        discriminator(fake.detach()).sigmoid().mean().backward()
        discriminator(fake).square().mean().backward()
    assert_report(monitor, per_sample_squared_norms(generator, lambda out, _: discriminator(out).square().mean(), z, z))
    assert other.n_samples == 10


# Passes inside of others


class CheckpointFunction(torch.autograd.Function):
    """Runs a block again in its backward, as offloading and reversible layers do.

    By its name the library knows that it hides a part of the graph.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.block, ctx.x = block, x.detach()
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.block(x), grad)
        return x.grad, None


class Offloaded(nn.Module):
    """Three layers, of which one is run again inside of the backward pass; ``deep`` inside of another such pass."""

    def __init__(self, hides: bool = True, last: bool = True) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4) if last else nn.Identity()
        self.hides = hides

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = CheckpointFunction.apply(h, self.block) if self.hides else self.block(h)
        return self.last(h)


class OnceMore(nn.Linear):
    """A layer that returns infinities when it runs again."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (torch.inf if torch.is_grad_enabled() else 1)


def squares(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().mean()


def plain_twin(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.hides = False
    return twin


@pytest.mark.parametrize("last", [False, True], ids=["at the end", "in the middle"])
def test_a_pass_inside_of_another_belongs_to_it(last: bool) -> None:
    model, x, y = Offloaded(last=last).double(), *torch.randn(2, 5, 4, dtype=torch.float64)
    monitor = without_and_with(model, lambda m: squares(m(x), y).backward())
    assert monitor.report().attrs["n_passes"] == 1
    assert_report(monitor, per_sample_squared_norms(plain_twin(model), squares, x, y))


@pytest.mark.parametrize("last", [False, True], ids=["at the end", "in the middle"])
def test_a_refusal_inside_of_a_nested_pass_waits_for_the_outermost_one(last: bool) -> None:
    model, x, y = Offloaded(last=last).double(), *torch.randn(2, 5, 4, dtype=torch.float64)

    def step(m: nn.Module) -> None:
        squares(m(x), y).backward()

    model.block = OnceMore(4, 4).double()
    assert_refused(model, step, CurvatureError, "not finite")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_cannot_be_recorded_of_a_forward_that_runs_again_waits_for_the_end(use_reentrant: bool) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, self.first(x).tanh(), use_reentrant=use_reentrant)

    def step(m: nn.Module) -> None:
        loss = squares(m(x), y)
        m(x[:3])  # the checkpoint's layer is taken for one of this call, the latest
        loss.backward()

    x, y = torch.randn(2, 6, 4, dtype=torch.float64)
    assert_refused(Again().double(), step, CurvatureError, r"Linear 'body'.*\(6, 4\).*not the batch of 3 samples")


def test_outputs_around_a_checkpoint_that_holds_all_parameters_are_watched() -> None:
    class Around(nn.Module):
        def __init__(self, hides: bool) -> None:
            super().__init__()
            self.first, self.body, self.last, self.hides = nn.Tanh(), nn.Linear(4, 4), nn.Softplus(), hides

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(checkpoint(self.body, h, use_reentrant=True) if self.hides else self.body(h))

    x, y = torch.randn(2, 5, 4, dtype=torch.float64)
    x.requires_grad_()
    model = Around(False).double()
    twin = Around(True).double()
    twin.load_state_dict(model.state_dict())
    plain, hidden = (
        without_and_with(m, lambda m: squares(m(x), y).backward(), activations=True) for m in (model, twin)
    )
    pd.testing.assert_frame_equal(hidden.activations, plain.activations)


def test_a_reentrant_checkpoint_in_which_a_second_pass_goes_through_one_forward() -> None:
    model = nn.Linear(4, 4).double()
    whole = copy.deepcopy(model)

    class Whole(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=True)

    x, y = torch.randn(5, 4, dtype=torch.float64).requires_grad_(), torch.randn(5, 4, dtype=torch.float64)

    def twice(m: nn.Module) -> None:
        loss = squares(m(x), y)
        loss.backward(retain_graph=True)
        loss.backward()

    subject, twin = Whole(model), Whole(whole)
    twice(twin)
    with FisherMonitor(subject) as monitor, pytest.raises(LifecycleError, match="second backward pass"):
        twice(subject)
    assert_same_gradients(gradients(subject), gradients(twin))
    assert monitor.n_samples == 5


# Passes under vmap


def jacobian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(model(x), y, reduction="none")
    parameters = list(model.parameters())
    return torch.autograd.grad(losses, parameters, torch.eye(5, dtype=losses.dtype), is_grads_batched=True)[0]


def jacobian_by_vmap(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(model(x), y, reduction="none")
    parameters = list(model.parameters())
    rows = torch.func.vmap(lambda v: torch.autograd.grad(losses, parameters, v, retain_graph=True))
    return rows(torch.eye(5, dtype=losses.dtype))[0]


@pytest.mark.parametrize("step", [jacobian, jacobian_by_vmap])
def test_a_vmapped_pass_is_left_out_with_a_word_at_the_end(step: Step) -> None:
    model, (x, y) = classifier(), batch()
    expected, found = step(copy.deepcopy(model), x, y), []
    with pytest.raises(UnsupportedError, match="under vmap"), FisherMonitor(model) as monitor:
        found.append(step(model, x, y))
        cross_entropy()(model(x), y).backward()
    assert torch.equal(found[0], expected)
    assert_report(monitor, norms(model, (x, y)))
    assert_refused(classifier(), lambda m: step(m, x, y), UnsupportedError, "under vmap")


def test_what_waits_for_the_end_of_the_block_never_hides_the_users_exception() -> None:
    model, (x, y) = classifier(), batch()
    with pytest.raises(ZeroDivisionError), FisherMonitor(model):
        jacobian(model, x, y)
        _ = 1 / 0


# A model that changes inside of the block


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x * self.w


def new_layer() -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(4, 4).double()


CHANGES: dict[str, tuple[Callable[[Holder], object], str]] = {
    "a layer": (lambda m: m.layers.__setitem__(1, new_layer()), r"layers\.1\.weight, layers\.1\.bias: replaced"),
    "a frozen layer": (lambda m: m.layers.__setitem__(1, new_layer().requires_grad_(False)), r"layers\.1\.weight"),
    "all layers": (lambda m: setattr(m, "layers", nn.ModuleList([new_layer()])), r"layers\.0\."),
    "a parameter": (lambda m: setattr(m, "w", nn.Parameter(torch.full((4,), 2.0).double())), r"w: replaced"),
    "one more layer": (lambda m: m.layers.append(new_layer()), r"layers\.2\."),
    "one layer less": (lambda m: m.layers.__delitem__(1), r"layers\.1\.weight"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_replaced_inside_of_the_block_is_refused(change: str) -> None:
    (act, match), x, y = CHANGES[change], *torch.randn(2, 5, 4, dtype=torch.float64)
    model = Holder().double()
    twin = copy.deepcopy(model)
    act(twin)
    squares(twin(x), y).backward()
    with FisherMonitor(model) as monitor:
        squares(model(x), y).backward()
        act(model)
        model.zero_grad()
        with pytest.raises(CoverageError, match=match):
            squares(model(x), y).backward()
    assert_same_gradients(gradients(model), gradients(twin))
    assert monitor.n_samples == 5
    again = copy.deepcopy(model)
    with FisherMonitor(again) as monitor:
        squares(again(x), y).backward()
    assert_equal(monitor.trace, total(trace(per_sample_squared_norms(again, squares, x, y))), monitor.trace)


def test_a_parameter_that_a_pass_does_not_reach_and_one_that_is_unfrozen_are_no_change() -> None:
    model, (x, y) = Heads().double(), batch()
    model.body.requires_grad_(False)
    with FisherMonitor(model) as monitor, nullcontext():
        model.body.requires_grad_()
        F.cross_entropy(model(x)[0], y).backward()
    assert monitor.n_samples == 5
    assert monitor.report().loc["b.weight", "rule"] == "unused"


def test_a_pass_that_an_interrupt_broke_off_takes_no_later_one_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the traceback, as a notebook keeps it, holds what was collected."""
    model, (x, y) = classifier(), batch()
    with FisherMonitor(model) as monitor:
        losses = [cross_entropy()(model(x), y) for _ in range(2)]
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as kept:
            patch.setattr(PassAccumulator, "add", interrupted)
            losses[0].backward()
        losses[1].backward()
    assert kept.value.__traceback__ is not None
    assert_report(monitor, norms(model, (x, y)))


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


# Passes for some parameters only


class Tied(nn.Module):
    """Uses a weight in two layers, and a scale after both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.scale, self.unused = nn.Parameter(torch.randn(4)), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) * self.scale).tanh()) * self.scale


WAYS: dict[str, Callable[[Tensor, list[Tensor]], object]] = {
    "backward": lambda loss, wanted: loss.backward(inputs=wanted),
    "grad": torch.autograd.grad,
}
WANTED = [["last.bias"], ["first.bias"], ["first.weight"], ["scale"], ["last.bias", "scale"], ["first.weight", "x"]]


def sizes(outputs: Tensor, _: object = None) -> Tensor:
    return outputs.square().sum(1).mean()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wanted", WANTED, ids="-".join)
@pytest.mark.parametrize("passes", [0, 3])  # after three, the next pass is not one whose sums are checked
def test_a_pass_for_some_parameters_is_refused_unless_these_are_all(way: str, wanted: list[str], passes: int) -> None:
    """It stops where nothing leads to them: at one of the two uses of a weight, before a layer, or nowhere."""
    torch.manual_seed(0)
    model, z = Tied().double(), torch.randn(5, 4).double()
    x = z.clone().requires_grad_("x" in wanted)
    named = {**dict(model.named_parameters()), "x": x}
    right = norms_of_sizes(model, z)

    def step() -> None:
        WAYS[way](sizes(model(x)), [named[name] for name in wanted])

    with pytest.raises(CoverageError, match="computes no gradient of"), FisherMonitor(model) as monitor:
        for _ in range(passes):
            sizes(model(x)).backward()
        step()
    assert monitor.n_samples == 5 * passes
    chosen = [name for name in wanted if name != "x"]
    with FisherMonitor(model, parameters=chosen) as some:
        step()
    assert_report(some, {name: right[name] for name in right if name in chosen})


def norms_of_sizes(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return per_sample_squared_norms(model, sizes, x, torch.zeros(len(x)).double())


@pytest.mark.parametrize("way", WAYS)
def test_a_pass_for_all_parameters_by_name_is_whole(way: str) -> None:
    """Also where some are used in no pass, so that it can't be asked for them all."""
    model, x = Tied().double(), torch.randn(5, 4).double()
    wanted = [p for name, p in model.named_parameters() if not name.startswith("unused")]
    with FisherMonitor(model) as monitor:
        for _ in range(4):
            WAYS[way](sizes(model(x)), wanted)
    right = norms_of_sizes(model, x)
    assert_report(monitor, {name: t.repeat(4) for name, t in right.items()})
