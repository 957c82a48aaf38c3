"""Models that leave samples where they are: marks go through their graphs on the schedule, and not in each step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_secorder import FisherMonitor
from torch_secorder.autograd.self_test import hooks_are_seen

STEPS, LOOKED_AT = 7, [1, 2, 3, 5]


class Last(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        state = self.layer(x)[1]
        return (state[0] if isinstance(state, tuple) else state)[-1]


class Pooled(nn.Module):
    """One position of each sample, at another place in each batch, and an attention of products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.first(x).chunk(3, -1)
        h = (q @ k.mT).softmax(-1) @ v
        return self.head(h[torch.arange(len(h)), x[..., 0].argmax(1)])


class Assigned(nn.Module):
    """A part of each sample is assigned, padded and cut off again, and others are changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu_()
        whole = torch.zeros(len(x), 9, 4, dtype=h.dtype)
        whole[:, 1:8] = h
        return self.head(F.pad(whole, (0, 0, 2, -1)).unfold(1, 3, 2).amax(-1))


class Doubled(torch.autograd.Function):
    """A user's function that works on single entries."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class Own(nn.Module):
    """Such a function between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Doubled.apply(self.first(x)))


class OneByOne(nn.Module):
    """Samples one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.head(self.first(one).tanh().sum(0)) for one in x])


MODELS = {
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 7)),
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3).eval(),
        nn.PReLU(3),
        nn.MaxPool2d(2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
        nn.InstanceNorm2d(3, affine=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ),
    "lstm": lambda: Last(nn.LSTM(4, 5, num_layers=2, batch_first=True)),
    "gru": lambda: Last(nn.GRU(4, 5, batch_first=True)),
    "rnn": lambda: Last(nn.RNN(4, 5, batch_first=True)),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    "pooling": Pooled,
    "assignment": Assigned,
    "a function of the user's": Own,
    "samples one by one": OneByOne,
}


# Nodes that write into a part are asked what they do. Where torch does not show that no hook would notice, marks are sent in each
# step.
UNASKED = set() if hooks_are_seen() else {"assignment"}


@pytest.mark.parametrize("name", MODELS)
def test_marks_are_sent_on_the_schedule(name: str, searches: list[int]) -> None:
    model, looked = MODELS[name](), []
    with FisherMonitor(model):
        for step in range(1, STEPS + 1):
            searches.clear()
            model(torch.randn(5, 7, 4)).square().flatten(1).sum(1).mean().backward()
            looked += [step] if searches else []
    assert looked == ([*range(1, STEPS + 1)] if name in UNASKED else LOOKED_AT)
