"""Batches as loaders yield them, and losses that the model computes itself, against a loop over samples."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from oracles import assert_equal, exact_fisher, per_sample_squared_norms, total, trace
from tagger import IGNORED, Outputs, Tagger, shares, squared_norms, tagged
from torch_secorder import empirical_fisher_trace, fisher_report, fisher_results
from torch_secorder.errors import ArgumentError, VerificationError

Loss = Callable[[Any, Any], Tensor]


def of_logits(outputs: Any, targets: Tensor) -> Tensor:
    """An average over the batch's labels."""
    return cross_entropy(outputs.logits.movedim(-1, 1), targets, ignore_index=IGNORED)


def of_batch(outputs: Any, batch: Any) -> Tensor:
    return of_logits(outputs, batch["labels"])


def assert_traces(report: Any, squared: dict[str, Tensor], reduction: str = "mean") -> None:
    expected = trace(squared, reduction)
    assert report.attrs["reduction"] == reduction
    assert list(report.index) == list(expected)
    for name, value in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), torch.float64)


class Encoding(UserDict):  # type: ignore[type-arg]
    """A mapping that is no dict, as tokenizers return."""


@pytest.mark.parametrize(
    ("loss_fn", "options"),
    [(of_batch, {}), (of_logits, {"labels": "labels"}), ("model", {}), ("model", {"labels": "labels"})],
    ids=["whole", "labels", "model", "model, labels"],
)
@pytest.mark.parametrize("kind", [dict, Encoding])
def test_a_mapping_is_one_batch(loss_fn: Loss | str, options: dict[str, Any], kind: type) -> None:
    model, batch = Tagger().double(), tagged()
    report = fisher_report(model, loss_fn, kind(batch), progress=False, **options)
    assert report.attrs["n_samples"] == 4
    assert_traces(report, squared_norms(model, shares(model, batch)))


def test_a_list_of_mappings_is_several_batches() -> None:
    model, data = Tagger("samples").double(), [tagged(8), tagged(8)]
    report = fisher_report(model, "model", data, progress=False)
    assert report.attrs["n_samples"] == 16
    assert_traces(report, squared_norms(model, [*shares(model, data[0]), *shares(model, data[1])]))


def test_the_targets_go_into_a_model_that_computes_its_loss_only() -> None:
    model, seen = Tagger().double(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append("labels" in kwargs), with_kwargs=True)
    fisher_report(model, of_logits, tagged(), labels="labels", progress=False)
    assert not any(seen)
    seen.clear()
    fisher_report(model, "model", tagged(), labels="labels", progress=False)
    assert all(seen)


def test_a_tuple_of_two_mappings_is_inputs_and_targets() -> None:
    model, batch = Tagger().double(), tagged()
    targets = {"labels": batch.pop("labels")}
    report = fisher_report(model, of_batch, (batch, targets), progress=False)
    assert_traces(report, squared_norms(model, shares(model, batch | targets)))


def test_a_tuple_of_two_whole_batches_is_not_half_of_them() -> None:
    model, data = Tagger("samples").double(), (tagged(8), tagged(8))
    with pytest.raises(ArgumentError, match=r"pass a list of the two if they are two batches"):
        fisher_report(model, "model", data, progress=False)
    assert fisher_report(model, "model", list(data), progress=False).attrs["n_samples"] == 16


@pytest.mark.parametrize("data", ["tuple", "loader"])
def test_what_follows_inputs_and_targets_is_not_used(data: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y, number = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,)), torch.arange(6)
    given = (x, y, number) if data == "tuple" else DataLoader(TensorDataset(x, y, number), batch_size=3)
    report = fisher_report(model, nn.CrossEntropyLoss(), given, progress=False)
    assert_traces(report, per_sample_squared_norms(model, nn.CrossEntropyLoss(), x, y))


def test_the_exact_fisher_takes_mappings_and_their_ignored_labels() -> None:
    class Logits(Tagger):
        def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input_ids).logits

    model, batch = Logits(vocabulary=4).double(), tagged(2, 3)
    batch = {"input_ids": batch["input_ids"] % 4, "labels": torch.where(batch["labels"] >= 0, 1, IGNORED)}
    options: dict[str, Any] = {"fisher": "exact", "class_axis": -1, "labels": "labels", "progress": False}
    report = fisher_report(model, None, batch, **options)
    assert_traces(report, exact_fisher(model, batch["input_ids"], batch["labels"], class_axis=-1))


# --------------------------------------------------------------------------------------------- the model's own loss


@pytest.mark.parametrize("loss", ["labels", "samples", "sum"])
@pytest.mark.parametrize("verify", [True, False])
def test_the_models_own_loss(loss: str, verify: bool) -> None:
    """Also where it sums, which giving its outputs twice can't show."""
    model, batch = Tagger(loss).double(), tagged()
    report = fisher_report(model, "model", batch, progress=False, verify=verify)
    assert_traces(report, squared_norms(model, shares(model, batch)), "sum" if loss == "sum" else "mean")


@pytest.mark.parametrize(
    "loss_fn", [lambda o, t: o.loss, lambda o, t: o["loss"] * 1.0], ids=["as it is", "computed with"]
)
@pytest.mark.parametrize("loss", ["labels", "sum"])
def test_a_loss_taken_out_of_the_outputs_is_the_models_own(loss_fn: Loss, loss: str) -> None:
    model, batch = Tagger(loss).double(), tagged()
    expected = squared_norms(model, shares(model, batch))
    reduction = "sum" if loss == "sum" else "mean"
    for verify in (True, False):
        report = fisher_report(model, loss_fn, batch, progress=False, verify=verify)
        assert_traces(report, expected, reduction)
    for function in (loss_fn, "model"):
        value = empirical_fisher_trace(model, function, batch, None)
        assert_equal(value.double(), total(trace(expected, reduction)), 0.0, torch.float64)


def test_outputs_that_are_a_tuple_with_the_loss_in_front() -> None:
    class Tuples(Tagger):
        def forward(self, **batch: Tensor) -> Any:  # type: ignore[override]
            outputs = super().forward(**batch)
            return outputs.loss, outputs.logits

    model, batch = Tuples("sum").double(), tagged()
    plain = Tagger("sum").double()
    plain.load_state_dict(model.state_dict())
    report = fisher_report(model, "model", batch, progress=False)
    assert_traces(report, squared_norms(plain, shares(plain, batch)), "sum")


def test_samples_without_a_label_have_no_gradient() -> None:
    """Alone, their average over no label is not a number; the first of them can't show how the loss averages either."""
    model, batch = Tagger().double(), tagged()
    batch["labels"][0] = IGNORED
    report = fisher_report(model, "model", batch, progress=False)
    assert_traces(report, squared_norms(model, shares(model, batch)))


def test_a_loss_inside_a_model_that_draws_random_numbers() -> None:
    model, batch = Tagger("sum", dropout=0.5).double(), tagged()
    torch.manual_seed(3)
    report = fisher_report(model, "model", batch, progress=False)
    after = torch.rand(())
    torch.manual_seed(3)
    loss = model(**batch).loss  # the batch's own draws, in one graph
    assert torch.equal(after, torch.rand(()))
    assert report.attrs["reduction"] == "sum"
    bias = torch.autograd.grad(loss, model.last.bias)[0]
    torch.manual_seed(3)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    each = cross_entropy(logits.movedim(-1, 1), batch["labels"], reduction="none", ignore_index=IGNORED).sum(1)
    grads = [torch.autograd.grad(one, model.last.bias, retain_graph=True)[0] for one in each]
    torch.testing.assert_close(sum(grads), bias)
    expected = sum(float(g.square().sum()) for g in grads)
    assert report.loc["last.bias", "fisher_trace"] == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("loss", ["root", "contrast"])
def test_own_losses_that_compare_samples_are_refused(loss: str) -> None:
    """The gradient of a root of a mean is each sample's own but for one factor, that of a sample's loss by itself."""
    with pytest.raises(VerificationError, match=r"compares samples|its squared gradient norms differ"):
        fisher_report(Tagger(loss).double(), "model", tagged(), progress=False)


def test_an_own_loss_that_neither_averages_nor_sums() -> None:
    with pytest.raises(ArgumentError, match=r"neither averages nor sums.*4 / 4 times as large"):
        fisher_report(Tagger("square").double(), "model", tagged(), progress=False)


def test_nothing_of_the_model_changes() -> None:
    model, batch = Tagger(dropout=0.1).double(), tagged()
    fisher_report(model, "model", batch, progress=False)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    assert not model._forward_hooks


# --------------------------------------------------------------------------------------------- nonsense


def without(batch: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in names}


@pytest.mark.parametrize(
    ("loss_fn", "data", "options", "message"),
    [
        ("model", without(tagged(), "labels"), {}, "without a loss.*let batches be mappings"),
        (lambda o, t: o.get("loss"), without(tagged(), "labels"), {}, "the loss is None.*not given its targets"),
        (
            of_logits,
            tagged(),
            {"labels": "y"},
            r"labels='y': the batch has no such entry; it has input_ids.*name the one",
        ),
        (of_logits, (torch.ones(2, 3).long(), torch.ones(2, 3).long()), {"labels": "y"}, "leave labels= out"),
        (of_logits, tagged(), {"labels": 1}, "labels must be the name of an entry"),
        (nn.CrossEntropyLoss(), tagged(), {}, "a mapping with input_ids, .*labels= names the entry"),
        (nn.CrossEntropyLoss(), tagged(), {"labels": "labels"}, "returned a Outputs; let the loss take"),
        ("model", [tagged(), without(tagged(), "labels")], {}, r"different entries.*a tuple \(inputs, targets\)"),
        ("model", tagged() | {"length": torch.ones(4)}, {}, "forward takes no 'length'.*left out of the batches"),
        ("model", [{}], {}, "a batch without any entry"),
        ("model", [torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)], {}, "must yield mappings or pairs"),
        ("average", tagged(), {}, 'or "model" for the loss that the model computes'),
    ],
)
def test_nonsense(loss_fn: Any, data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        fisher_results(Tagger().double(), loss_fn, data, progress=False, **options)


def test_errors_of_the_users_own_loss_stay_what_they_are() -> None:
    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        fisher_report(nn.Linear(2, 2), broken, (torch.ones(3, 2), torch.ones(3, 2)), progress=False)


# --------------------------------------------------------------------------------------------- how many, and which


def numbered(n: int = 7, size: int = 3) -> tuple[nn.Module, Tensor, Tensor, list[dict[str, Any]]]:
    model, x, y = Tagger("samples").double(), torch.randint(7, (n, 5)), torch.randint(7, (n, 5))
    parts = zip(x.split(size), y.split(size), torch.arange(10, 10 + n).split(size), strict=True)
    return model, x, y, [{"input_ids": a, "labels": b, "id": c} for a, b, c in parts]


@pytest.mark.parametrize("max_samples", [1, 3, 5, 7, 100])
@pytest.mark.parametrize("fisher", ["empirical", "observed"])
def test_max_samples_cuts_the_last_batch(max_samples: int, fisher: str) -> None:
    model, x, y, data = numbered()
    drawn: list[int] = []
    batches = ((b["input_ids"], b["labels"]) for i, b in enumerate(data) if drawn.append(i) is None)  # type: ignore[func-returns-value]
    options: dict[str, Any] = {"fisher": fisher, "class_axis": -1, "progress": False}
    report = fisher_report(model, of_logits, batches, max_samples=max_samples, **options)
    k = min(max_samples, 7)
    assert report.attrs["n_samples"] == k
    assert drawn == list(range(-(-k // 3))), "no batch more is drawn"
    scale = 5 if fisher == "observed" else 1  # the log-likelihood is a sum over positions
    logits = [model(x[n : n + 1]).logits.movedim(-1, 1) for n in range(k)]
    losses = [scale * cross_entropy(f, y[n : n + 1]) for n, f in enumerate(logits)]
    assert_traces(report, squared_norms(model, losses))


def test_samples_that_cannot_be_cut_are_refused() -> None:
    """Two tensors that all samples share outvote the one that counts them."""

    class Shifted(nn.Linear):
        def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + first.sum() * second.sum()

    inputs, y = (torch.randn(6, 4), torch.ones(4), torch.ones(4)), torch.randint(3, (6,))
    with pytest.raises(ArgumentError, match=r"can't be cut to the 5 that are left.*max_batches="):
        fisher_report(Shifted(4, 3), nn.CrossEntropyLoss(), (inputs, y), max_samples=5, progress=False)


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        ("id", range(10, 15)),
        (2, range(10, 15)),
        (lambda batch: [f"row {i}" for i in batch[2]], ["row 10", "row 11", "row 12", "row 13", "row 14"]),
    ],
    ids=["entry", "place", "function"],
)
def test_ids_name_the_rows(ids: Any, names: Iterable[Any], tmp_path: Path) -> None:
    model, x, y, data = numbered()
    given = data if ids == "id" else [tuple(batch.values()) for batch in data]
    loss_fn = "model" if ids == "id" else of_logits
    results = fisher_results(model, loss_fn, given, per_sample=True, ids=ids, max_samples=5, progress=False)
    expected = [*names]
    assert list(results.per_sample.index) == expected
    losses = [cross_entropy(model(x[n : n + 1]).logits.movedim(-1, 1), y[n : n + 1]) for n in range(5)]
    for name, column in (squared := squared_norms(model, losses)).items():
        assert_equal(torch.tensor(results.per_sample[name].to_numpy()), column, total(squared), torch.float64)
    results.save(tmp_path / "rows.safetensors")
    again = type(results).load(tmp_path / "rows.safetensors")
    assert list(again.per_sample.index) == expected
    again.merge(fisher_results(model, of_logits, (x[:1], y[:1]), per_sample=True, progress=False))
    assert list(again.per_sample.index)[:-1] == expected
    assert again.per_sample.index.name == "sample"


def test_rows_that_were_saved_before_there_were_ids_are_numbered() -> None:
    model, x, y, _ = numbered()
    results = fisher_results(model, of_logits, (x, y), per_sample=True, progress=False)
    state = results.state_dict()
    del state["ids"]
    results.load_state_dict(state)
    results.merge(fisher_results(model, of_logits, (x, y), per_sample=True, progress=False))
    assert list(results.per_sample.index) == list(range(14))


@pytest.mark.parametrize(
    ("ids", "keeps", "message"),
    [
        ("id", False, "pass per_sample=True"),
        ("number", True, "ids='number': the batch has no such entry, but input_ids, labels, id"),
        (0.5, True, "ids must be the name of an entry"),
        (lambda batch: [1.5] * 3, True, "a list of names or numbers"),
        (lambda batch: "abc", True, "a list of names or numbers"),
        (lambda batch: [1, 2], True, "2 of them for a batch of 3 samples"),
    ],
)
def test_nonsense_of_ids(ids: Any, keeps: bool, message: str) -> None:
    class Taking(Tagger):
        def forward(self, input_ids: Tensor, labels: Tensor, id: Tensor | None = None) -> Outputs:  # type: ignore[override]
            return super().forward(input_ids, None, labels)

    with pytest.raises(ArgumentError, match=message):
        fisher_results(Taking(), "model", numbered()[3], per_sample=keeps, ids=ids, progress=False)
    with pytest.raises(ArgumentError, match="no such entry, but places 0 to 1"):
        fisher_results(Tagger(), of_logits, numbered()[1:3], per_sample=True, ids=2, progress=False)
    with pytest.raises(ArgumentError, match="max_samples must be an int >= 1"):
        fisher_results(Tagger(), of_logits, numbered()[1:3], max_samples=0, progress=False)
