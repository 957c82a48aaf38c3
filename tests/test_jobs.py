"""The code of the how-to pages, beside loops over single samples."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.jobs import JOBS, PAGES, Job, diagonal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft's own, of transformers
]


@cache
def bits_and_loop() -> tuple[dict[str, Any], Any]:
    """What the page of transformers' bits makes, and what the loop finds there, which takes seconds."""
    job, names = names_of("transformer_bits")
    return names, job.loop(names)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.page)
def test_a_page_finds_what_a_loop_finds(job: Job, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the Trainer makes a folder
    names, of_loop = bits_and_loop() if job.page == "transformer_bits" else (job.run(), None)
    found = job.call(names).double()
    expected = (job.loop(names) if of_loop is None else of_loop).double()
    assert found.shape == expected.shape
    assert float(expected.norm()) > 0
    assert float((found - expected).norm()) <= job.rtol * float(expected.norm())


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.page)
def test_a_page_is_short_and_in_the_table(job: Job) -> None:
    assert len((PAGES / f"{job.page}.rst").read_text(encoding="utf-8").splitlines()) <= 60
    assert f"<{job.page}>`: {job.number}\n     - {job.lines()}\n" in (PAGES / "jobs.rst").read_text(encoding="utf-8")


def names_of(page: str) -> tuple[Job, dict[str, Any]]:
    (job,) = (job for job in JOBS if job.page == page)
    return job, job.run()


def test_merged_weights_are_the_average_by_the_diagonals() -> None:
    """The page's own formula, with the loop's diagonals."""
    job, names = names_of("merge")
    diagonals = job.loop(names).chunk(2)
    weights = [torch.cat([p.detach().double().flatten() for p in model.parameters()]) for model in names["models"]]
    stiff = [d + 1e-8 for d in diagonals]
    expected = (stiff[0] * weights[0] + stiff[1] * weights[1]) / (stiff[0] + stiff[1])
    merged = torch.cat([names["merged"][name].double().flatten() for name, _ in names["base"].named_parameters()])
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-6)


def test_dampened_weights_are_those_of_the_formula() -> None:
    _, names = names_of("unlearn")
    model, before = names["model"], names["before"]
    after = {name: p.detach().double() for name, p in model.named_parameters()}
    model.load_state_dict(before)
    everything = diagonal(model, names["inputs"], names["targets"])
    forgotten = diagonal(model, *names["forget"])
    dampened = 0
    for name, weight in before.items():
        chosen = forgotten[name] > 1.5 * everything[name]
        expected = torch.where(chosen, weight * (everything[name] / forgotten[name]), weight.double())
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-7)
        dampened += int(chosen.sum())
    assert 0 < dampened < sum(weight.numel() for weight in before.values())


def test_four_draws_come_near_to_all_labels() -> None:
    """The bits of the page are of a sampled Fisher: four draws for each of eight sequences, over all tokens that might come."""
    names, expected = bits_and_loop()
    found = torch.cat([d.double() for d in names["results"].diagonal.values()])
    assert found.sum() == pytest.approx(float(expected.sum()), rel=0.3)
    assert not torch.equal(found, expected)
