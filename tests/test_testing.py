"""The public oracle: it is what other loops find, and says so where the library is wrong."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from model_state import assert_unchanged, state
from oracles import assert_equal, per_sample_gradients, vmap_gradients
from torch_secorder import register_rule
from torch_secorder.errors import ArgumentError, UnsupportedError, VerificationError
from torch_secorder.per_sample import Dense
from torch_secorder.testing import check, sample_gradients


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batch(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4), torch.randint(3, (n,))


def test_the_loop_is_what_vmap_and_samples_alone_find() -> None:
    model, (x, y) = classifier(), batch()
    found = sample_gradients(model, nn.CrossEntropyLoss(), x, y)
    for others in (vmap_gradients, per_sample_gradients):
        for name, expected in others(model, nn.CrossEntropyLoss(), x, y).items():
            assert_equal(found[name], expected, 0.0)
    assert model[0].weight.dtype == torch.float32
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_rows_add_up_to_the_gradient_of_a_loss_with_another_normalizer(reduction: str) -> None:
    model, (x, y) = classifier().double(), batch(6)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), reduction=reduction, ignore_index=1)
    found = sample_gradients(model, loss, x, y)
    loss.double()(model(x.double()), y).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        rows = found[name].mean(0) if reduction == "mean" else found[name].sum(0)
        torch.testing.assert_close(rows, p.grad, rtol=1e-10, atol=1e-14)


def test_samples_on_another_axis() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    model, x, y = Recurrent(), torch.randn(7, 5, 4), torch.randn(7, 5, 3)
    found = sample_gradients(model, lambda f, t: (f - t).square().sum(), x, y, batch_axis=1)
    for sample in range(5):
        twin = Recurrent().double()
        twin.load_state_dict(model.state_dict())
        one = slice(sample, sample + 1)
        (twin(x[:, one].double()) - y[:, one].double()).square().sum().backward()
        torch.testing.assert_close(
            found["layer.weight_hh_l0"][sample], twin.layer.weight_hh_l0.grad, rtol=1e-10, atol=1e-14
        )
    assert check(model, lambda f, t: (f - t).square().sum(), (x, y), batch_axis=1).attrs["equal"]


def test_axes_apart() -> None:
    class Turned(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).transpose(0, 1)  # [samples, steps, classes]

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(f.mean(1), y)

    model, x, y = Turned(4, 3), torch.randn(7, 5, 4), torch.randint(3, (5,))
    assert check(model, loss, (x, y), batch_axis={"inputs": 1}).attrs["equal"]
    with pytest.raises(ArgumentError, match="one axis each for inputs, outputs and targets"):
        sample_gradients(model, loss, x, y, batch_axis={"inputs": {0: 1}})
    for name in ("n_samples", "sample_of"):
        with pytest.raises(ArgumentError, match=f"and no {name}="):
            check(model, loss, (x, y), **{name: 5})


def test_complex_parameters() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(self.weight.dtype) @ self.weight).abs()

    model, (x, y) = Complex(), batch()
    assert sample_gradients(model, cross_entropy, x, y)["weight"].dtype == torch.complex128
    assert check(model, cross_entropy, (x, y)).attrs["equal"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_check_says_equal(dtype: torch.dtype, reduction: str) -> None:
    model, (x, y) = classifier().to(dtype), batch()
    before = state(model)
    loss = functools.partial(cross_entropy, weight=torch.tensor([1.0, 2.0, 0.5], dtype=dtype), reduction=reduction)
    found = check(model, loss, (x.to(dtype), y))
    assert_unchanged(before, model)
    assert list(found.columns) == ["library", "loop", "relative_error", "verdict"]
    assert set(found["verdict"]) == {"equal"}
    assert found.attrs == {"reduction": reduction, "n_samples": 5, "mode": "as it is", "equal": True}
    expected = per_sample_gradients(model, loss, x.to(dtype), y, shares_of=reduction)
    factor = 1 / 5 if reduction == "mean" else 1.0
    assert list(found["loop"]) == pytest.approx([factor * float(g.square().sum()) for g in expected.values()])


def test_check_tells_rounding_from_errors() -> None:
    model, (x, y) = classifier().bfloat16(), batch()
    found = check(model, cross_entropy, (x.bfloat16(), y))
    assert "rounding" in set(found["verdict"])
    assert "different" not in set(found["verdict"])
    assert found.attrs["equal"]


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@register_rule(Scale)
def _too_large(module: nn.Module, call: Any) -> Any:
    return {"scale": Dense(1.01 * call.inputs[0] * call.grad_output)}


def test_check_finds_a_wrong_rule() -> None:
    model, (x, y) = nn.Sequential(Scale(), nn.Linear(4, 3)), batch()
    with pytest.raises(VerificationError, match=r"0\.scale"):
        check(model, cross_entropy, (x, y))
    found = check(model, cross_entropy, (x, y), verify=False)
    assert dict(found["verdict"]) == {"0.scale": "different", "1.weight": "equal", "1.bias": "equal"}
    assert found.loc["0.scale", "relative_error"] == pytest.approx(1.01**2 - 1, rel=1e-3)
    assert not found.attrs["equal"]


def test_dropout_is_switched_off_for_both_and_on_again() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    found = check(model, cross_entropy, batch())
    assert (found.attrs["mode"], found.attrs["equal"]) == ("eval", True)
    assert model.training
    assert model[1].training


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


class Copyless(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copies of this")


class Single(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Comparing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (f := super().forward(x)) @ f.T


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "loss", "data", "words"),
    [
        (nn.Linear(4, 3), None, batch(), "loss_fn must be"),
        (nn.Linear(4, 3), cross_entropy, batch()[0], r"must be \(inputs, targets\) or a mapping"),
        (nn.Linear(4, 3), "mine", batch(), 'or "model" for the loss that the model computes'),
        (nn.Linear(4, 3), cross_entropy, {"x": batch()[0]}, "forward takes no 'x'"),
        (nn.Linear(4, 3), "model", batch(), "returned a Tensor without a loss"),
        (Noisy(4, 3), cross_entropy, batch(), "draws random numbers in eval mode too"),
        (Copyless(4, 3), cross_entropy, batch(), "can't be copied"),
    ],
)
def test_what_has_no_loop_is_refused_in_words(model: nn.Module, loss: Any, data: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        check(model, loss, data)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((nn.Linear(4, 3), cross_entropy, *batch()), {"names": ["wait"]}, "no parameter 'wait'"),
        ((nn.Linear(4, 3), cross_entropy, *batch()), {"batch_axis": 2}, "counts samples"),
        ((nn.Linear(4, 3), lambda f, t: f.sum() ** 2, *batch()), {}, "neither averages nor sums"),
        (
            (nn.Linear(4, 3), lambda f, t: f.float() @ torch.ones(3, 2, dtype=torch.float16), *batch()),
            {},
            "the loss raised",
        ),
        ((Single(4, 3), cross_entropy, *batch()), {}, "runs in float64"),
        ((Comparing(4, 3), cross_entropy, *batch()), {}, "sample 0 alone has an output of shape"),
    ],
)
def test_the_loop_says_what_it_lacks(arguments: Any, options: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        sample_gradients(*arguments, **options)


def test_check_passes_on_what_the_library_refuses() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    with pytest.raises(UnsupportedError, match="BatchNorm1d"):
        check(model, cross_entropy, batch())


class Tagger(nn.Module):
    """A model with a loss of its own, as those of transformers have it."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.embedding, self.head, self.reduction = nn.Embedding(7, 6), nn.Linear(6, 7), reduction

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.embedding(ids).cumsum(1)))
        if labels is None:
            return {"logits": logits}
        # In float32, whatever the model is in, as in transformers.
        loss = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction=self.reduction)
        return {"loss": loss, "logits": logits}


def tokens() -> dict[str, Tensor]:
    """Four sequences, of which one has labels on all five positions, and the last on two."""
    ids = torch.randint(7, (4, 5))
    lengths = torch.tensor([5, 3, 4, 2])
    return {"ids": ids, "labels": ids.where(torch.arange(5) < lengths[:, None], -100)}


def share(tagger: Tagger, batch: dict[str, Tensor], sample: int) -> Tensor:
    """A sequence's part of the batch's loss, from its logits and labels alone, times the number of sequences if it averages."""
    logits = tagger(batch["ids"][sample : sample + 1])["logits"][0]
    total = cross_entropy(logits, batch["labels"][sample], reduction="sum")
    return total * 4 / (batch["labels"] != -100).sum() if tagger.reduction == "mean" else total


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["model", lambda outputs, batch: outputs["loss"]], ids=["named", "read"])
def test_the_models_own_loss(loss: Any, reduction: str) -> None:
    model, data = Tagger(reduction), tokens()
    found = check(model, loss, data)
    assert found.attrs["equal"]
    assert found.attrs["reduction"] == reduction
    gradients = sample_gradients(model, loss, data, data)
    for sample in range(4):
        rows = torch.autograd.grad(share(model, data, sample), list(model.parameters()))
        for (name, _), row in zip(model.named_parameters(), rows, strict=True):
            torch.testing.assert_close(gradients[name][sample].float(), row, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_loss_in_float32_is_no_difference(dtype: torch.dtype) -> None:
    found = check(Tagger().to(dtype), "model", tokens())
    assert found.attrs["equal"]
    assert found["relative_error"].max() > 1e-9  # what a loss in float32 loses


def test_batches_with_names_and_with_more_than_two_parts() -> None:
    data = tokens()

    def loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return cross_entropy(outputs["logits"].flatten(0, 1), targets.flatten())

    named = check(Tagger(), loss, data, labels="labels")
    assert named.attrs["equal"]
    pair = check(Tagger(), lambda o, batch: loss(o, batch["labels"]), ({"ids": data["ids"]}, data))
    assert pair.attrs["equal"]
    x, y = batch()
    assert check(classifier(), cross_entropy, (x, y, ["weights", "of", "the", "five", "samples"])).attrs["equal"]
    with pytest.raises(ArgumentError, match="has no such entry; it has ids, labels"):
        check(Tagger(), loss, data, labels="targets")


class Contrastive(Tagger):
    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        found = super().forward(ids)["logits"].mean(1)
        return {"loss": (found @ found.T).logsumexp(1).mean(), "logits": found}


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (Contrastive(), tokens(), "compares samples"),
        (Tagger(), tokens() | {"labels": torch.tensor([[-100] * 5] + [[1] * 5] * 3)}, "sample 0 alone is nan"),
        (Tagger(), {name: rows[:1].repeat(4, 1) for name, rows in tokens().items()}, "so much alike"),
    ],
)
def test_own_losses_without_a_loop_are_refused_in_words(model: nn.Module, data: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        sample_gradients(model, "model", data, None)
