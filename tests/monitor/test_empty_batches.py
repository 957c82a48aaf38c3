"""A batch without samples, as the last shard of a data set or a draw of each sample at random may be: it adds nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expectations import expectation
from model_state import assert_same_gradients, gradients
from monitor.classifier import REDUCTIONS, assert_report, backward, batch, classifier, cross_entropy, norms
from oracles import assert_equal, exact_fisher, per_sample_squared_norms, total, trace
from problems._base import Forward
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report, fisher_results
from torch_secorder.autograd.self_test import hooks_are_seen
from torch_secorder.errors import ArgumentError, CoverageError, LifecycleError, ShapeError
from torch_secorder.pruning import Gates

Batch = tuple[Tensor, Tensor]
NOTHING: Batch = torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)


def trained(model: nn.Module, batches: list[Batch], reduction: str) -> None:
    for one in batches:
        backward(model, *one, reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_monitor_passes_over_it(place: int, reduction: str) -> None:
    model, batches = classifier(), [batch(5), batch(3)]
    with_nothing = [*batches[:place], NOTHING, *batches[place:]]
    trained(model, with_nothing, reduction)
    expected = gradients(model)
    model.zero_grad()
    keeps: dict[str, Any] = {"diagonal": True, "per_sample": True, "activations": True}
    with FisherMonitor(model, reduction, **keeps) as monitor:
        trained(model, with_nothing, reduction)
    assert_same_gradients(gradients(model), expected)
    assert_report(monitor, norms(model, *batches, reduction=reduction), reduction)
    assert monitor.report().attrs["n_passes"] == 2
    assert len(monitor.per_sample) == 8
    other = FisherMonitor(model, reduction, **keeps)
    with other:
        trained(model, batches, reduction)
    for figure in ("grad_sq_norm", "fisher_trace_stderr"):
        assert monitor.report()[figure].tolist() == pytest.approx(other.report()[figure].tolist(), rel=1e-12)
    assert monitor.activations["activation_trace"].tolist() == pytest.approx(
        other.activations["activation_trace"].tolist(), rel=1e-12
    )


class Layers(nn.Module):
    """Layers of all kinds, and some behind a checkpoint; a re-entrant one hides what an encoder would leave open."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.words, self.reentrant = nn.Embedding(7, 8), reentrant
        self.body = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.encoder = nn.Tanh() if reentrant else nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)
        self.convolution, self.head = nn.Conv1d(8, 4, 3), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.encoder(checkpoint(self.body, self.words(ids), use_reentrant=self.reentrant))
        return self.head(self.convolution(h.mT).tanh().mean(2))


# A use beside a checkpoint may have hooks as well, for all that such a torch shows.
BESIDE_A_CHECKPOINT = (
    ""
    if hooks_are_seen()
    else r"self_attn\.out_proj\.weight: used by .*; torch \S+ does not show which saved tensors have hooks"
)


@pytest.mark.parametrize(("reentrant", "refusal"), [(False, BESIDE_A_CHECKPOINT), (True, "")])
def test_layers_of_all_kinds_pass_over_it(reentrant: bool, refusal: str) -> None:
    model = Layers(reentrant).double()
    ids, y = torch.randint(7, (13, 5)), torch.randint(3, (13,))
    with expectation(refusal):
        with FisherMonitor(model) as monitor:
            for one in ((ids[:6], y[:6]), (ids[:0], y[:0]), (ids[6:], y[6:])):
                backward(model, *one)
        model.reentrant = False  # The loop differentiates for the parameters only, which such a checkpoint can't.
        assert_report(monitor, per_sample_squared_norms(model, cross_entropy(), ids, y))


def test_one_pass_may_go_through_an_empty_batch_and_another() -> None:
    model, one = classifier(), batch()
    with FisherMonitor(model) as monitor:
        (cross_entropy()(model(one[0]), one[1]) + model(NOTHING[0]).sum()).backward()
        (model(NOTHING[0]).sum() + cross_entropy()(model(one[0]), one[1])).backward()
    assert_report(monitor, norms(model, one, one))


def test_verify_has_nothing_to_look_at() -> None:
    model, one = classifier(), batch()
    with FisherMonitor(model) as monitor:
        for x, y in (one, NOTHING):
            outputs = model(x)
            loss = cross_entropy()(outputs, y)
            monitor.verify(loss)
            loss.backward()
    assert_report(monitor, norms(model, one))


def test_a_hook_of_the_users_and_an_evaluation_change_nothing() -> None:
    model, one = classifier(), batch()
    with FisherMonitor(model) as monitor:
        model[0].weight.register_hook(lambda grad: 2 * grad)
        with torch.no_grad():
            model(NOTHING[0])
        trained(model, [NOTHING, one], "mean")
    assert_report(monitor, norms(model, one))


def test_what_goes_another_way_is_refused_nevertheless() -> None:
    model, (x, _) = classifier(), batch()
    with FisherMonitor(model), pytest.raises(CoverageError, match=r"nothing accounts for"):
        (model(NOTHING[0]).sum() + nn.functional.linear(x, model[0].weight).square().sum()).backward()


def test_a_monitor_that_saw_nothing_else_says_so() -> None:
    model = classifier()
    with FisherMonitor(model) as monitor:
        trained(model, [NOTHING, NOTHING], "sum")
    with pytest.raises(LifecycleError, match=r"2 calls of Sequential had an empty batch, and no other"):
        monitor.report()
    with FisherMonitor(model) as monitor:
        trained(model, [NOTHING], "sum")
        monitor.reset()
        trained(model, [batch()], "sum")
    assert monitor.n_samples == 5


def test_an_input_without_rows_counts_samples_only_if_the_outputs_have_none() -> None:
    model = Forward(lambda m, extra, x: m.l(x) + extra.sum(), l=nn.Linear(4, 3)).double()
    (x, y), extra = batch(), torch.zeros(0).double()
    with FisherMonitor(model), pytest.raises(ShapeError, match=r"'inputs': \{0: None\}"):
        model(extra, x)
    words = {"batch_axis": {"inputs": {0: None}}}
    with FisherMonitor(model, **words) as monitor:
        cross_entropy()(model(extra, x), y).backward()
    expected = norms(model.l, (x, y))
    assert_report(monitor, {f"l.{name}": t for name, t in expected.items()})
    after = Forward(lambda m, x, extra: m.l(x) + extra.sum(), l=nn.Linear(4, 3)).double()
    with FisherMonitor(after) as monitor:
        cross_entropy()(after(x, extra), y).backward()
    assert_report(monitor, {f"l.{name}": t for name, t in norms(after.l, (x, y)).items()})


@pytest.mark.parametrize("words", [{"sample_of": 1}, {"n_samples": lambda x, of: len(of.unique()), "sample_of": 1}])
def test_no_row_is_no_sample(words: dict[str, Any]) -> None:
    model = Forward(lambda m, x, of: m.l(x), l=nn.Linear(4, 3)).double()
    x, y = batch(6)
    of = torch.tensor([0, 0, 1, 1, 2, 2])
    with FisherMonitor(model, "sum", **words) as monitor:
        cross_entropy("sum")(model(x, of), y).backward()
        cross_entropy("sum")(model(NOTHING[0], of[:0]), NOTHING[1]).backward()
    assert monitor.n_samples == 3


def test_gates_pass_over_it() -> None:
    model, one = classifier(), batch()
    found = []
    for batches in ([one], [NOTHING, one]):
        with Gates(model, fisher="sampled") as gates:
            trained(model, batches, "mean")
        found.append(gates)
    assert found[0].n_samples == found[1].n_samples == 5
    for name, values in found[0].fisher.items():
        assert torch.equal(values, found[1].fisher[name])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_report_passes_over_it(place: int) -> None:
    model, batches = classifier(), [batch(5), batch(3)]
    data = [*batches[:place], NOTHING, *batches[place:]]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    squared = per_sample_squared_norms(model, cross_entropy(), x, y)
    expected = {"empirical": trace(squared), "observed": trace(squared), "exact": trace(exact_fisher(model, x))}
    for fisher, value in expected.items():
        loss = cross_entropy() if fisher == "empirical" else None
        found = fisher_results(model, loss, data, fisher=fisher, progress=False, per_sample=True)
        assert found.n_samples == len(found.per_sample) == 8
        for name, one in value.items():
            assert_equal(torch.tensor(found.report().loc[name, "fisher_trace"]), one, total(value), torch.float64)


def test_the_first_batch_with_samples_is_verified() -> None:
    model, (x, y) = classifier(), batch()
    seen: list[int] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(outputs))
        return cross_entropy()(outputs - outputs.mean(0), targets)

    with pytest.raises(Exception, match="other samples' outputs"):
        fisher_report(model, loss, [NOTHING, (x, y)], progress=False)
    assert 0 not in seen


def test_without_any_sample_there_is_no_number() -> None:
    with pytest.raises(ArgumentError, match="no batch with samples"):
        fisher_report(classifier(), cross_entropy(), [NOTHING, NOTHING], progress=False)
    with pytest.raises(
        ShapeError, match=r"empty: it has 0 samples \(axis 0 of input 0, shape \(0, 4\)\); leave it out"
    ):
        empirical_fisher_trace(classifier(), cross_entropy(), *NOTHING)
