"""Random state is left as it was, on accelerators of any kind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torch_secorder.autograd import random_state
from torch_secorder.autograd.random_state import forked_random, set_random_state


class Generators:
    """A kind of device whose states are numbers, and that has ``count`` devices, or one without a name."""

    def __init__(self, count: int) -> None:
        self.states = {f"xpu:{index}": torch.tensor(index) for index in range(count)}

    def get_rng_state(self, device: Any) -> torch.Tensor:
        return self.states[str(device)].clone()

    def set_rng_state(self, state: torch.Tensor, device: Any) -> None:
        self.states[str(device)] = state

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [state.clone() for state in self.states.values()]

    def set_rng_state_all(self, states: list[torch.Tensor]) -> None:
        self.states = dict(zip(self.states, states, strict=True))


def test_draws_in_a_block_leave_the_states_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Generators(3)
    monkeypatch.setattr(torch, "xpu", made)
    there: Any = [SimpleNamespace(device=torch.device(name)) for name in ("xpu:1", "xpu:2", "cpu")]
    cpu = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), forked_random(there):
        torch.rand(1)
        for state in made.states.values():
            state += 10
        1 / 0  # noqa: B018  # an error inside of the block
    assert [int(state) for state in made.states.values()] == [10, 1, 2]  # the first one has no tensor
    assert torch.equal(torch.get_rng_state(), cpu)


def test_states_are_taken_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Generators(2)
    monkeypatch.setattr(torch, "xpu", made)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    before = random_state.random_state()
    drawn = torch.rand(1)
    made.states["xpu:1"] += 5
    set_random_state(before)
    assert [int(state) for state in made.states.values()] == [0, 1]
    assert torch.equal(torch.rand(1), drawn)
