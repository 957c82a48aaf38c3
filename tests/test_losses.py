"""Causal language models: the shift inside the loss and inside the likelihood, against loops over samples and positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from oracles import assert_equal, exact_fisher, total, trace
from tagger import IGNORED, Tagger, squared_norms, tagged
from torch_secorder import fisher_report, generalized_fisher_trace
from torch_secorder.errors import ArgumentError, CurvatureError, ShapeError
from torch_secorder.losses import causal_lm


def log_likelihoods(model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> list[list[Tensor]]:
    """-log p of each label given all tokens before it, sample by sample and position by position."""
    found = []
    for n in range(len(labels)):
        f = log_softmax(model(batch["input_ids"][n : n + 1], batch["attention_mask"][n : n + 1]).logits[0], -1)
        pairs = [(t, int(labels[n, t + 1])) for t in range(labels.shape[1] - 1)]
        found.append([-f[t, label] for t, label in pairs if label != IGNORED])
    return found


def shares(each: list[list[Tensor]], per: str) -> list[Tensor]:
    n, counted = len(each), sum(map(len, each))
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    sums = [sum(es, zero) for es in each]
    if per == "batch":
        return [n * s / counted for s in sums]
    return [s / max(len(es), 1) for s, es in zip(sums, each, strict=True)] if per == "sequence" else sums


def assert_traces(report: Any, squared: dict[str, Tensor], reduction: str = "mean") -> None:
    expected = trace(squared, reduction)
    assert report.attrs["reduction"] == reduction
    for name, value in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), torch.float64)


@pytest.mark.parametrize("padding", ["labels", "mask"])
@pytest.mark.parametrize("per", ["batch", "sequence", "sum"])
def test_the_fisher_of_a_causal_loss(per: str, padding: str) -> None:
    """The last of these padded sequences has a single token, of which nothing is predicted."""
    model, batch = Tagger().double(), tagged(5, 5)
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], IGNORED)
    expected = squared_norms(model, shares(log_likelihoods(model, batch, labels), per))
    reduction = "sum" if per == "sum" else "mean"
    del batch["labels"]
    given = batch if padding == "mask" else batch | {"labels": labels}
    options = {} if padding == "mask" else {"labels": "labels"}
    assert_traces(fisher_report(model, causal_lm(per), given, progress=False, **options), expected, reduction)
    assert_traces(fisher_report(model, causal_lm(per), given, progress=False), expected, reduction)


def test_a_sum_under_mean_is_the_fisher_of_observed_labels() -> None:
    model, batch = Tagger().double(), tagged()
    mean = fisher_report(model, causal_lm("sum"), batch, reduction="mean", progress=False)
    options: dict[str, Any] = {"fisher": "observed", "class_axis": -1, "shift": True, "progress": False}
    observed = fisher_report(model, None, batch, labels="labels", **options)
    for name, value in mean.fisher_trace.items():
        assert observed.fisher_trace[name] == pytest.approx(value, rel=1e-8)


def test_the_loss_is_what_torch_says() -> None:
    logits, ids = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    ids[1, 3:] = IGNORED
    expected = cross_entropy(logits[:, :-1].reshape(-1, 7), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(causal_lm()(logits, ids), expected)
    assert causal_lm()(logits.bfloat16(), ids).dtype == torch.float32
    other = torch.where(ids == IGNORED, 0, ids)
    torch.testing.assert_close(
        causal_lm(ignore_index=0)(logits, other),
        cross_entropy(logits[:, :-1].reshape(-1, 7), other[:, 1:].reshape(-1), ignore_index=0),
    )


# --------------------------------------------------------------------------------------------- shift=True


def test_observed_labels_are_those_at_the_next_position() -> None:
    model, batch = Tagger().double(), tagged()
    expected = squared_norms(model, shares(log_likelihoods(model, batch, batch["labels"]), "sum"))
    options: dict[str, Any] = {"fisher": "observed", "class_axis": -1, "shift": True, "progress": False}
    assert_traces(fisher_report(model, None, batch, labels="labels", **options), expected)
    assert_traces(fisher_report(model, None, batch, **options), expected)  # found by its name
    unshifted = fisher_report(model, None, batch, labels="labels", **(options | {"shift": False}))
    assert abs(unshifted.fisher_trace.sum() / float(total(trace(expected))) - 1) > 0.05, (
        "the shift makes no difference here"
    )


class Predicting(Tagger):
    """Outputs at those positions only that predict something, in torch's order of axes."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids).logits[:, :-1].movedim(-1, 1)


class Transposed(Tagger):
    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids).logits.movedim(-1, 1)


@pytest.mark.parametrize("fisher", ["exact", "sampled"])
@pytest.mark.parametrize(("kind", "class_axis"), [(Tagger, -1), (Transposed, -2)])
def test_the_last_position_has_no_label(fisher: str, kind: type[Tagger], class_axis: int) -> None:
    """As many draws as exact passes are exact."""
    model, plain = kind(vocabulary=4).double(), Predicting(vocabulary=4).double()
    plain.load_state_dict(model.state_dict())
    ids, mask = torch.randint(4, (3, 4)), torch.ones(3, 4)
    mask[1, 2:] = 0
    labels = torch.where(mask.bool(), ids, IGNORED)
    options: dict[str, Any] = {"fisher": fisher, "class_axis": class_axis, "shift": True, "progress": False}
    options |= {"num_samples": 9} if fisher == "sampled" else {}
    expected = exact_fisher(plain, ids, labels[:, 1:])
    assert_traces(fisher_report(model, None, ({"input_ids": ids}, labels), **options), expected)
    assert_traces(fisher_report(model, None, (ids, None), **options), exact_fisher(plain, ids))


def test_sampled_labels_are_right_on_average() -> None:
    model, batch = Tagger(vocabulary=4).double(), {"input_ids": torch.randint(4, (40, 4))}
    options: dict[str, Any] = {"class_axis": -1, "shift": True, "progress": False}
    exact = fisher_report(model, None, batch, fisher="exact", **options).fisher_trace.sum()
    generator = torch.Generator().manual_seed(0)
    draws = [
        fisher_report(
            model, None, batch, fisher="sampled", verify=False, generator=generator, **options
        ).fisher_trace.sum()
        for _ in range(60)
    ]
    error = torch.tensor(draws).std() / 60**0.5
    assert abs(sum(draws) / 60 - exact) < 4 * error < 0.1 * exact


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 4, 4)])
def test_three_axes_without_anything_that_tells_which_has_the_classes_are_refused(shape: tuple[int, ...]) -> None:
    """The last case can't be told by targets either."""
    model = nn.Linear(2, shape[2])
    outputs = model(torch.randn(*shape[:2], 2))
    targets = None if shape == (3, 4, 6) else torch.zeros(3, 4).long()
    with pytest.raises(ArgumentError, match=r"class_axis=-1 for \(samples, positions, classes\).*class_axis=-2"):
        generalized_fisher_trace(model, outputs, targets)
    last, first = (float(generalized_fisher_trace(model, outputs, targets, class_axis=axis)) for axis in (-1, -2))
    assert last > 0
    assert first > 0
    assert last != first


# --------------------------------------------------------------------------------------------- padding


class TwoAxes(Tagger):
    """Three classes for each position, classes last, whatever else the batch has."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids, attention_mask).logits


def loop_over_positions(model: nn.Module, batch: dict[str, Tensor], counted: Tensor) -> dict[str, Tensor]:
    """E ||gradient of -log p||^2 of every sample, a sum over its counted positions' labels, which are independent."""
    rows = []
    for n in range(len(counted)):
        logits = model(batch["input_ids"][n : n + 1], batch["attention_mask"][n : n + 1])[0]
        found = dict.fromkeys(dict(model.named_parameters()), torch.zeros((), dtype=torch.float64))
        for t in counted[n].nonzero().flatten().tolist():
            for label, p in enumerate(logits[t].softmax(-1).tolist()):
                one = squared_norms(
                    model,
                    [
                        -log_softmax(
                            model(batch["input_ids"][n : n + 1], batch["attention_mask"][n : n + 1])[0, t], -1
                        )[label]
                    ],
                )
                found = {name: value + p * one[name][0] for name, value in found.items()}
        rows.append(found)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("given", ["mask", "mask and labels", "labels of a few positions", "pair"])
@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_padding_has_no_labels_of_the_models_own(fisher: str, given: str) -> None:
    """A position that the mask hides, or that has the label -100, contributes nothing. So many draws are exact."""
    model, batch = TwoAxes(vocabulary=7).double(), tagged(3, 3)
    mask, labels = batch["attention_mask"].bool(), batch.pop("labels")
    counted = mask
    if given == "labels of a few positions":
        counted = torch.zeros(3, 3).bool()
        counted[0, 1] = counted[1, 0] = counted[2, 0] = True
        labels = labels.where(counted, IGNORED)
    data: Any = batch | {"labels": labels} if "labels" in given else (batch, None) if given == "pair" else batch
    options: dict[str, Any] = {"fisher": fisher, "class_axis": -1, "progress": False}
    options |= {"num_samples": 18} if fisher == "sampled" else {}
    expected = loop_over_positions(model, batch, counted)
    everything = loop_over_positions(model, batch, torch.ones(3, 3).bool())
    assert float(total(trace(everything)) / total(trace(expected))) > 1.2, "padding makes no difference here"
    assert_traces(fisher_report(model, None, data, **options), expected)


@pytest.mark.parametrize("given", ["mask", "pair"])
def test_padding_with_a_shift(given: str) -> None:
    model, batch = TwoAxes().double(), tagged()
    del batch["labels"]
    labels = batch["input_ids"].where(batch["attention_mask"].bool(), IGNORED)
    options: dict[str, Any] = {"fisher": "exact", "class_axis": -1, "shift": True, "progress": False}
    found = fisher_report(model, None, (batch, None) if given == "pair" else batch, **options)
    told = fisher_report(model, None, (batch, labels), **options)
    for name, value in told.fisher_trace.items():
        assert found.fisher_trace[name] == pytest.approx(value, rel=1e-12)


def test_a_mask_is_nothing_to_one_label_for_each_sample() -> None:
    class Whole(Tagger):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input_ids, attention_mask).logits.sum(1)

    model, batch = Whole().double(), tagged(3, 4)
    del batch["labels"]
    found = fisher_report(model, None, batch, fisher="exact", progress=False)
    assert_traces(found, exact_fisher(model, batch))


def test_a_decoder_has_a_mask_of_its_own() -> None:
    class Decoder(Tagger):
        def forward(  # type: ignore[override]
            self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Tensor
        ) -> Tensor:
            return super().forward(decoder_input_ids).logits + super().forward(input_ids).logits.mean(
                (1, 2), keepdim=True
            )

    model, mask = Decoder().double(), torch.ones(3, 4).long()
    mask[1, 2:] = 0
    batch = {"input_ids": torch.randint(7, (3, 4)), "attention_mask": mask.flip(0, 1)}
    batch |= {"decoder_input_ids": torch.randint(7, (3, 4)), "decoder_attention_mask": mask}
    options: dict[str, Any] = {"fisher": "exact", "class_axis": -1, "progress": False}
    told = fisher_report(model, None, (batch, torch.where(mask.bool(), 0, IGNORED)), **options)
    for name, value in fisher_report(model, None, batch, **options).fisher_trace.items():
        assert told.fisher_trace[name] == pytest.approx(value, rel=1e-12)


def test_a_mask_of_other_positions_than_the_outputs() -> None:
    """An encoder's mask says nothing of a decoder's positions; labels that say it are what the message asks for."""

    class Pooled(TwoAxes):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input_ids, attention_mask)[:, :2]

    model, batch = Pooled(), tagged(3, 4)
    del batch["labels"]
    options: dict[str, Any] = {"fisher": "exact", "class_axis": -1, "progress": False}
    with pytest.raises(ShapeError, match=r"attention_mask of shape \(3, 4\) hides.*positions \(3, 2\).*labels= names"):
        fisher_report(model, None, batch, **options)
    counted = batch | {"counted": torch.zeros(3, 2).long()}
    assert fisher_report(model, None, counted, labels="counted", **options).attrs["n_samples"] == 3


# --------------------------------------------------------------------------------------------- nonsense


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": True, "fisher": "empirical"}, r"shift=True is for.*torch_secorder.losses.causal_lm"),
        ({"shift": 1}, "shift must be True or False"),
        ({"shift": True, "loss_type": "mse"}, 'is for loss_type="nll"'),
        ({"shift": True, "class_axis": 1}, "expected .*; they fit class_axis=-1"),
        ({"shift": False, "class_axis": 1}, "expected .*; they fit class_axis=-1"),
        ({"shift": True, "labels": None}, "neither labels nor input_ids, but inputs, y: labels= names"),
        ({"shift": False, "fisher": "observed", "labels": None}, "passed to fisher_report as labels="),
    ],
)
def test_nonsense(options: dict[str, Any], message: str) -> None:
    class Named(Tagger):
        def forward(self, inputs: Tensor, y: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return super().forward(inputs).logits

    batch = {"inputs": torch.randint(7, (2, 5)), "y": torch.randint(7, (2, 5))}
    given: dict[str, Any] = {"fisher": "exact", "labels": "y", "class_axis": -1, "progress": False} | options
    with pytest.raises(CurvatureError, match=message):
        fisher_report(Named(), causal_lm(), batch, **given)


def test_shapes_that_fit_no_sequence() -> None:
    with pytest.raises(ShapeError, match="two positions or more"):
        fisher_report(
            Tagger(), None, (torch.ones(2, 1).long(), None), fisher="exact", class_axis=-1, shift=True, progress=False
        )
    with pytest.raises(ShapeError, match=r"logits of three axes.*not of shape \(2, 3\)"):
        fisher_report(nn.Linear(4, 3), None, (torch.ones(2, 4), None), fisher="exact", shift=True, progress=False)
    with pytest.raises(ShapeError, match=r"not logits of shape \(2, 3, 4\) and labels that are of shape \(2, 4\)"):
        causal_lm()(torch.zeros(2, 3, 4), torch.zeros(2, 4).long())
    with pytest.raises(ShapeError, match="labels that are a NoneType"):
        causal_lm()(torch.zeros(2, 3, 4), None)
    with pytest.raises(ArgumentError, match="per must be one of 'batch', 'sequence', 'sum'"):
        causal_lm("token")
    with pytest.raises(ArgumentError, match="ignore_index must be an int"):
        causal_lm(ignore_index=None)  # type: ignore[arg-type]
