"""fisher_report brings batches to the device that the model is on, and asks for no copy to be waited for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import pretend
from torch_secorder import fisher_report
from torch_secorder.errors import ArgumentError
from torch_secorder.running.placing import Placing

HERE, THERE = torch.device("pretend:0"), torch.device("pretend:1")


def devices(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.device
    return {k: devices(v) for k, v in value.items()} if isinstance(value, dict) else [devices(v) for v in value]


NESTED = {"ids": torch.zeros(2), "more": [torch.zeros(2), (torch.zeros(2),)]}


def test_nested_batches_are_moved_without_a_wait() -> None:
    placed = Placing([torch.zeros(1, device=HERE)])
    with pretend.counting() as counts:
        assert devices(placed(NESTED)) == {"ids": HERE, "more": [HERE, [HERE]]}
    assert not counts.waits
    assert placed(None) is None


def test_lengths_of_packed_sequences_stay_on_the_host() -> None:
    packed = Placing([torch.zeros(1, device=HERE)])((pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)]),))[0]
    assert (packed.data.device, packed.batch_sizes.device.type) == (HERE, "cpu")


@pytest.mark.parametrize(
    "parameters",
    [[torch.zeros(1)], [torch.zeros(1, device=HERE), torch.zeros(1, device=THERE)], []],
    ids=["on the host", "on several devices", "none"],
)
def test_batches_are_left_where_nothing_says_where_to(parameters: list[Tensor]) -> None:
    assert Placing(parameters)(NESTED) is NESTED


def test_what_the_user_has_placed_is_left() -> None:
    batch = (torch.zeros(2, device=HERE), torch.zeros(2))
    assert Placing([torch.zeros(1, device=HERE)])(batch) is batch
    assert devices(Placing([torch.zeros(1, device=HERE)], "pretend:1")(batch)) == [THERE, THERE]


def test_a_device_that_is_none_is_refused() -> None:
    with pytest.raises(ArgumentError, match="device must be one of torch's, not 'nowhere'"):
        Placing([], "nowhere")


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("device", [None, "pretend"])
def test_a_report_of_a_model_on_a_device(fisher: str, device: str | None) -> None:
    model, data = nn.Linear(3, 2).double(), (torch.randn(5, 3).double(), torch.randint(2, (5,)))
    loss_fn = nn.CrossEntropyLoss()
    right = fisher_report(model, loss_fn, data, fisher=fisher, progress=False)["fisher_trace"]
    found = fisher_report(pretend.moved(model), loss_fn, data, fisher=fisher, progress=False, device=device)[
        "fisher_trace"
    ]
    assert found.to_numpy() == pytest.approx(right.to_numpy(), rel=1e-8)
