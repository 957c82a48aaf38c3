"""Every problem's numbers on the GPU are those of the CPU, in each dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expectations import expectation
from oracles import mapped
from test_differential import (
    AS_CAPTURED,
    DRIVERS,
    EVERY,
    EXACT,
    OTHERS,
    Step,
    assert_close,
    expected,
    of_names,
    plain,
    refusals_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),  # re-entrant checkpoints
]
# In float64 there is no fused recurrence, attention or normalization on GPUs; in float32 there is.
TOLERANCES = {torch.float64: EXACT, torch.float32: AS_CAPTURED}


def on_gpu(step: Step) -> Step:
    """The same step there."""
    batches = tuple(mapped(batch, lambda value: mapped(value, lambda x: x.to("cuda"))) for batch in step.batches)
    return replace(step, model=step.model.to("cuda"), batches=batches)


# torch's kernel of a weight norm keeps seven digits there, in the user's own gradients too.
SEVEN_DIGITS = {"awkward-weight_normed"}
# cuDNN's recurrence has no backward in eval mode, with a monitor or without.
TRAINED = {"awkward-lstm"}
# Parameters are drawn in the first forward, other ones in each dtype.
LAZY = {"awkward-lazy_linear"}


@of_names(*OTHERS)
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_problem(name: str, driver: str, dtype: torch.dtype) -> None:
    if name in LAZY and dtype != torch.float64:
        pytest.skip("its parameters are drawn in the first forward, others in each dtype")
    torch.set_default_device(None)
    right, step = expected(name), plain(name, dtype)
    model = EVERY[name].setting(dtype).model
    step = on_gpu(replace(step, model=model.train() if name in TRAINED else model))
    torch.set_default_device("cuda")
    with expectation(refusals_of(name).get(driver, "")):
        tolerance = max(TOLERANCES[dtype], 1e-6 if name in SEVEN_DIGITS else 0.0)
        assert_close(DRIVERS[driver](step), right, tolerance, driver)


def test_weight_norms_have_seven_digits_without_a_monitor() -> None:
    """Were it otherwise, the numbers above would have to be better, too."""
    torch.set_default_device(None)
    name = next(iter(SEVEN_DIGITS))
    found = []
    for step in (plain(name), on_gpu(replace(plain(name), model=EVERY[name].setting().model))):
        ((x, y),) = step.batches
        step.loss(step.model(x), y).backward()
        found.append([p.grad.cpu() for p in step.model.parameters()])
    assert max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True)) > 1e-10
