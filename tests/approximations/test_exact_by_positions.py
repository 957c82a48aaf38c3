"""The exact Fisher where a Linear layer makes the outputs of every position: passes begin before it, one position at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from oracles import assert_equal, exact_fisher, total, trace
from torch_secorder import fisher_report, generalized_fisher_trace
from torch_secorder.autograd.self_test import hooks_are_seen
from torch_secorder.errors import ArgumentError
from torch_secorder.running import by_last_layer
from torch_secorder.running.outputs_backward import OutputsBackward

pytestmark = pytest.mark.skipif(not hooks_are_seen(), reason="this torch does not show whether the factors may be read")

WORDS, LOSS_TYPES = 5, ["nll", "bce", "mse", "poisson"]


class Tagger(nn.Module):
    """From ids ``(N, T)`` to logits ``(N, T, C)``; what a position says depends on all positions before it."""

    def __init__(self, classes: int = 4, width: int = 3, bias: bool = True):
        super().__init__()
        self.words, self.hidden, self.last = (
            nn.Embedding(WORDS, 4),
            nn.Linear(4, width),
            nn.Linear(width, classes, bias=bias),
        )

    def features(self, ids: Tensor) -> Tensor:
        return self.hidden(self.words(ids).cumsum(1)).tanh()

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.features(ids))


class Recurrent(Tagger):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 3, batch_first=True)

    def features(self, ids: Tensor) -> Tensor:
        # Of what is not contiguous, torch adds the bias in a node of its own.
        return self.lstm(super().features(ids))[0].contiguous()


class Grid(Tagger):
    """Two axes of positions."""

    def features(self, ids: Tensor) -> Tensor:
        return super().features(ids).unflatten(1, (-1, 1)).contiguous()


def ids(n: int = 3, positions: int = 3) -> Tensor:
    return torch.randint(WORDS, (n, positions))


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many passes began before the last layer, each time, and -1 for each pass that did not."""
    found: list[int] = []
    of_seed, of_seeds = OutputsBackward.of_seed, OutputsBackward.of_seeds

    def whole(self: OutputsBackward, seed: Tensor, passes: object = None) -> object:
        if passes is None:
            found.append(-1)
        return of_seed(self, seed, passes)  # type: ignore[arg-type]  # The fixture does not look at the passes.

    def parts(self: OutputsBackward, seeds: object, passes: object) -> Tensor:
        found.append(len(seeds := list(seeds)))  # type: ignore[call-overload]  # It is iterable.
        return of_seeds(self, seeds, passes)  # type: ignore[arg-type]  # The fixture does not look at the passes.

    monkeypatch.setattr(OutputsBackward, "of_seed", whole)
    monkeypatch.setattr(OutputsBackward, "of_seeds", parts)
    return found


def values(model: nn.Module, x: Tensor, y: Tensor | None, loss_type: str, **options: object) -> list[Tensor]:
    """Four times the same value; the fourth is not verified."""
    return [generalized_fisher_trace(model, model(x), y, loss_type, **options) for _ in range(4)]  # type: ignore[arg-type]  # Options of the function.


@pytest.mark.parametrize(("few", "bias"), [(0, True), (128, False)])  # the one is before the layer, the other in it
@pytest.mark.parametrize(("classes", "positions"), [(2, 5), (4, 3), (4, 1), (9, 3)])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_it_is_exact(
    loss_type: str,
    classes: int,
    positions: int,
    bias: bool,
    few: int,
    starts: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(by_last_layer, "FEW_CLASSES", few)
    model, x = Tagger(classes, bias=bias).double(), ids(positions=positions)
    y = torch.randint(classes, x.shape) if loss_type == "nll" else None
    expected = total(trace(exact_fisher(model, x, y, loss_type, class_axis=-1)))
    for value in values(model, x, y, loss_type, class_axis=-1):
        assert_equal(value, expected, expected)
    # The layer has three inputs, so that nine classes take no more passes than these.
    of_position = 3 if classes == 9 else classes - (loss_type == "nll")
    assert starts == [1, of_position * positions] * 3 + [of_position * positions]


@pytest.mark.parametrize("kind", [Recurrent, Grid])
def test_other_layers_before_it(kind: type[Tagger], starts: list[int]) -> None:
    model, x = kind().double(), ids()
    expected = total(trace(exact_fisher(model, x, None, class_axis=-1)))
    for value in values(model, x, None, "nll", class_axis=-1):
        assert_equal(value, expected, expected)
    assert -1 not in starts


def test_positions_that_do_not_count(starts: list[int]) -> None:
    model, x = Tagger().double(), ids(positions=4)
    y = torch.tensor([[0, 1, -100, -100], [2, -100, -100, -100], [0, 3, 1, -100]])
    expected = total(trace(exact_fisher(model, x, y, class_axis=-1)))
    for value in values(model, x, y, "nll", class_axis=-1):
        assert_equal(value, expected, expected)
    assert starts[-1] == 3 * 3  # The last position counts in no sample.


def test_no_position_counts() -> None:
    model, x = Tagger().double(), ids()
    for value in values(model, x, torch.full_like(x, -100), "nll", class_axis=-1):
        assert value == 0


def test_single_precision(starts: list[int]) -> None:
    model, x = Tagger(), ids()
    expected = total(trace(exact_fisher(model, x, None, class_axis=-1)))
    for value in values(model, x, None, "nll", class_axis=-1):
        assert_equal(value, expected, expected, torch.float32)
    assert -1 not in starts


class Tied(Tagger):
    """The words' vectors are also the last layer's weight, as in a language model."""

    def __init__(self) -> None:
        super().__init__(WORDS, 4, bias=False)
        self.last.weight = self.words.weight


class Transposed(Tagger):
    """Classes are on the axis before the last one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, 2)


class Scaled(Tagger):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Padded(Tagger):
    """A position is added behind the layer."""

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return torch.cat([found, torch.zeros_like(found[:, :1])], 1)


class Moved(Tagger):
    """The rows of a position are neighbors, and not those of a sample."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x).transpose(0, 1)).transpose(0, 1)


class Folded(Tagger):
    """The rows of a position are neighbors, and the outputs are a view that cuts them into samples in another way."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.features(x).flatten(0, 1)
        return self.last(rows.flip(0)).flip(0).view(*x.shape, -1)


WHOLE: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind for kind in (Tied, Transposed, Scaled, Padded, Moved, Folded)
}


@pytest.mark.parametrize("name", WHOLE)
def test_other_last_layers_take_whole_passes(name: str, starts: list[int]) -> None:
    model, x = WHOLE[name]().double(), ids(positions=2)
    axis = 1 if name == "Transposed" else -1
    y = torch.randint(4, (3, 3) if name == "Padded" else x.shape)
    expected = total(trace(exact_fisher(model, x, y, class_axis=axis)))
    for value in values(model, x, y, "nll", class_axis=axis):
        assert_equal(value, expected, expected)
    assert set(starts) == {-1}


# fisher_report, which runs the model


def reported(model: nn.Module, x: Tensor, y: Tensor | None, **options: object) -> dict[str, Tensor]:
    report = fisher_report(model, None, (x, y), fisher="exact", class_axis=-1, progress=False, **options)  # type: ignore[arg-type]  # The options differ by test.
    return {name: torch.tensor(value) for name, value in report["fisher_trace"].items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("classes", "positions"), [(2, 5), (4, 3), (9, 3)])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_each_parameter_of_a_report(loss_type: str, classes: int, positions: int, bias: bool, ends: list[bool]) -> None:
    model, x = Tagger(classes, bias=bias).double(), ids(positions=positions)
    y = torch.randint(classes, x.shape) if loss_type == "nll" else None
    expected = trace(exact_fisher(model, x, y, loss_type, class_axis=-1))
    for name, value in reported(model, x, y, loss_type=loss_type).items():
        assert_equal(value, expected[name], total(expected))
    assert ends.count(True) == 1 + -(-positions // classes)  # one for the check


def test_a_report_of_shifted_labels(ends: list[bool]) -> None:
    """What a position says is about the next one, and the last one says nothing."""
    model, x = Tagger(WORDS).double(), ids(positions=4)
    labels = x.clone()
    labels[0, 2] = -100
    moved = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    expected = trace(exact_fisher(model, x, moved, class_axis=-1))
    for name, value in reported(model, x, labels, shift=True, verify=False).items():
        assert_equal(value, expected[name], total(expected))
    assert ends == [True, *[False] * 4 * 3]  # five classes take four passes for each of three positions


@pytest.mark.parametrize("hooked", ["outputs", "product"])
def test_hooks_of_the_users_on_the_gradient_are_seen(hooked: str, ends: list[bool]) -> None:
    class Hooked(Tagger):
        def forward(self, x: Tensor) -> Tensor:
            outputs = super().forward(x)
            node = outputs.grad_fn if hooked == "outputs" else outputs.grad_fn.next_functions[0][0]  # type: ignore[union-attr]  # It has both.
            node.register_prehook(lambda grads: (2 * grads[0],))  # type: ignore[union-attr]  # It has one.
            return outputs

    model, x = Hooked().double(), ids(positions=2)
    expected = trace(exact_fisher(model, x, None, class_axis=-1))
    for name, value in reported(model, x, None).items():
        assert_equal(value, expected[name], total(expected))
    assert not any(ends)


def test_the_most_passes_are_those_of_all_positions() -> None:
    model, x = Tagger().double(), ids()
    with pytest.raises(ArgumentError, match="takes 9 backward passes"):
        generalized_fisher_trace(model, model(x), None, class_axis=-1, max_passes=8)
