"""Results away from the block: on every rank, in files, and of every k-th step."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from oracles import assert_equal, per_sample_gradients
from ranks import on_ranks
from torch_secorder import FisherMonitor, __version__, fisher_results
from torch_secorder.errors import ArgumentError, LifecycleError

FIGURES = ["fisher_trace", "fisher_trace_stderr", "fisher_trace_share", "fisher_mean", "grad_sq_norm"]
BATCHES = [5, 3, 8, 1, 6, 2, 4]  # of all ranks: rank r takes every world-size-th, so that some have more


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    n = BATCHES[number]
    return torch.randn(n, 4, generator=generator).double(), torch.randint(3, (n,), generator=generator)


def watched(model: nn.Module, numbers: Any, **options: Any) -> FisherMonitor:
    with FisherMonitor(model, **options) as monitor:
        for number in numbers:
            x, y = batch(number)
            F.cross_entropy(model(x), y).backward()
    return monitor


def same(one: pd.DataFrame, other: pd.DataFrame, rtol: float = 1e-12) -> None:
    pd.testing.assert_frame_equal(one[FIGURES], other[FIGURES], rtol=rtol, atol=1e-15)
    assert one.attrs["n_samples"] == other.attrs["n_samples"]
    assert one.attrs["n_passes"] == other.attrs["n_passes"]


# Ranks


def by_hand(rank: int, world: int) -> dict[str, Any]:
    """Uneven batches, and a last rank that sees nothing."""
    numbers = [n for n in range(len(BATCHES)) if n % (world - 1) == rank]
    monitor = watched(network(), numbers, per_sample=True, diagonal=True)
    alone = monitor.n_samples
    synced = monitor.report(sync=True)
    assert monitor.n_samples == alone
    monitor.all_reduce()
    once = monitor.report()
    monitor.all_reduce().all_reduce()
    same(synced, once)
    same(monitor.report(), once)
    return {"report": once, "diagonal": monitor.diagonal, "rows": monitor.per_sample}


def distributed(rank: int, world: int) -> pd.DataFrame:
    """DistributedDataParallel with gradients accumulated under no_sync on every other batch."""
    model = DistributedDataParallel(network())
    with FisherMonitor(model) as monitor:
        for turn in range(2):
            x, y = batch((world * turn + rank) % len(BATCHES))
            if turn == 0:
                with model.no_sync():
                    F.cross_entropy(model(x), y).backward()
            else:
                F.cross_entropy(model(x), y).backward()
    return monitor.report(sync=True)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_get_the_table_of_one_process(world: int, tmp_path: Path) -> None:
    found = on_ranks(by_hand, world, tmp_path)
    order = [n for rank in range(world - 1) for n in range(len(BATCHES)) if n % (world - 1) == rank]
    alone = watched(network(), order, per_sample=True, diagonal=True)
    for one in found:
        same(one["report"], alone.report())
        pd.testing.assert_frame_equal(one["rows"], alone.per_sample)
        torch.testing.assert_close(one["diagonal"], alone.diagonal)


@pytest.mark.slow
def test_ranks_of_distributed_data_parallel(tmp_path: Path) -> None:
    found = on_ranks(distributed, 2, tmp_path)
    alone = watched(network(), [0, 2, 1, 3])
    for one in found:
        same(one, alone.report())


def test_without_a_process_group() -> None:
    monitor = watched(network(), [0])
    for call in (monitor.all_reduce, lambda: monitor.report(sync=True)):
        with pytest.raises(LifecycleError, match="init_process_group"):
            call()


# Files


def test_saved_results_come_back_whole(tmp_path: Path) -> None:
    keeps = {"diagonal": True, "per_sample": True, "activations": True}
    monitor = watched(network(), [0, 1], **keeps)
    monitor.save(tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    alone = FisherMonitor.load(tmp_path / "a.safetensors")
    again = FisherMonitor.load(tmp_path / "a.safetensors", network())
    for other in (alone, again):
        pd.testing.assert_frame_equal(
            other.report().drop(columns="module_type"), monitor.report().drop(columns="module_type")
        )
        pd.testing.assert_frame_equal(other.per_sample, monitor.per_sample)
        pd.testing.assert_frame_equal(other.activations, monitor.activations)
        torch.testing.assert_close(other.diagonal, monitor.diagonal, rtol=0, atol=0)
    assert isinstance(again, FisherMonitor)
    pd.testing.assert_frame_equal(alone.report("type")[FIGURES], monitor.report("type")[FIGURES])


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.nothing = nn.Linear(4, 3), nn.Linear(5, 2), nn.Parameter(torch.zeros(2, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_saved_diagonal_is_read_by_others(reduction: str, tmp_path: Path) -> None:
    import safetensors
    import safetensors.torch

    model, x, y = WithUnused(), torch.randn(6, 4), torch.randint(3, (6,))
    with FisherMonitor(model, reduction=reduction, diagonal=True, fisher="observed") as monitor:
        F.cross_entropy(model(x), y, reduction=reduction).backward()
    assert all(value.is_contiguous() for value in monitor.diagonal.values())
    monitor.save_diagonal(tmp_path / "fisher.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["fisher.safetensors"]
    found = safetensors.torch.load_file(tmp_path / "fisher.safetensors")
    gradients = per_sample_gradients(model, nn.CrossEntropyLoss(reduction="sum"), x, y)
    assert set(found) == set(gradients)
    for name, value in found.items():
        expected = gradients[name].square().sum(0) / (6 if reduction == "mean" else 1)
        assert_equal(value, expected, expected.sum(), torch.float32)
    with safetensors.safe_open(tmp_path / "fisher.safetensors", framework="pt") as file:
        assert file.metadata() == {
            "reduction": reduction,
            "fisher": "observed",
            "n_samples": "6",
            "version": __version__,
        }


def test_a_diagonal_that_is_not_there_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(LifecycleError, match="diagonal was not asked for"):
        watched(network(), [0]).save_diagonal(tmp_path / "a")
    with pytest.raises(ArgumentError, match="there is no folder"):
        watched(network(), [0], diagonal=True).save_diagonal(tmp_path / "missing" / "a")
    assert not list(tmp_path.iterdir())


def test_jobs_merge_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    whole = watched(network(), range(5))
    watched(network(), [0, 1]).save(tmp_path / "a")
    watched(network(), [2, 3, 4]).save(tmp_path / "b")
    same(FisherMonitor.load(tmp_path / "a").merge(FisherMonitor.load(tmp_path / "b")).report(), whole.report())
    model = network()
    monitor = FisherMonitor.load(tmp_path / "a", model)
    assert isinstance(monitor, FisherMonitor)
    with monitor:
        for number in (2, 3, 4):
            x, y = batch(number)
            F.cross_entropy(model(x), y).backward()
    same(monitor.report(), whole.report())


def test_files_that_are_not_whole_or_not_ours(tmp_path: Path) -> None:
    import safetensors.torch

    path = tmp_path / "a"
    watched(network(), [0]).save(path)
    whole = path.read_bytes()
    for torn in (whole[:-9], whole[: len(whole) // 2], b"", b"nonsense"):
        path.write_bytes(torn)
        with pytest.raises(ArgumentError, match="whole file"):
            FisherMonitor.load(path)
    for metadata in (None, {"torch_secorder": json.dumps({})}):
        safetensors.torch.save_file({"x": torch.zeros(1)}, path, metadata)
        with pytest.raises(ArgumentError, match=r"not of this library|not written by"):
            FisherMonitor.load(path)
    with pytest.raises(ArgumentError, match="no such file"):
        FisherMonitor.load(tmp_path / "missing")
    watched(network(), [0]).save(path)
    with pytest.raises(ArgumentError, match="different parameters"):
        FisherMonitor.load(path, nn.Linear(2, 2))


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    monitor = watched(network(), [0])
    monitor.save(path)
    before = path.read_bytes()

    def torn(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", torn)
    with pytest.raises(KeyboardInterrupt):
        monitor.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# Every k-th step


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_kth_step_is_watched(every: int) -> None:
    thin = watched(network(), range(7), every=every)
    same(thin.report(), watched(network(), range(0, 7, every)).report())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.first, self.inner, self.reentrant = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 7), nn.Tanh()), reentrant
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_steps_are_passed_over_too(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = Checkpointed(reentrant).double()
    same(watched(model, [0, 1, 2, 5], every=2).report(), watched(model, [0, 2]).report())


def test_a_backward_pass_through_a_step_that_is_watched_and_one_that_is_not() -> None:
    model = network()
    x, y = batch(0)
    with FisherMonitor(model, every=2, repeated_calls="new") as monitor:
        with pytest.raises(LifecycleError, match="every=2"):
            (F.cross_entropy(model(x), y) + F.cross_entropy(model(x), y)).backward()
        assert monitor.n_samples == 0
    with pytest.raises(ArgumentError, match="every"):
        FisherMonitor(model, every=0)


def test_results_are_copied_and_a_monitor_says_what_to_copy() -> None:
    model = nn.Linear(3, 2)
    results = fisher_results(model, None, (torch.randn(6, 3), None), fisher="exact", progress=False)
    assert repr(results) == "Results(2 parameters, reduction='mean', fisher='exact', 6 samples)"
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(results)).report(), results.report())
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"state_dict\(\)"):
            copied(FisherMonitor(model))


def test_a_missing_extra_is_an_import_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 2)
    results = fisher_results(model, None, (torch.randn(4, 3), None), fisher="exact", diagonal=True, progress=False)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for write in (results.save, results.save_diagonal):
        with pytest.raises(ImportError, match=r"need safetensors: pip install 'torch-secorder\[save\]'"):
            write(tmp_path / "fisher.safetensors")
    with pytest.raises(ImportError, match=r"torch-secorder\[save\]"):
        FisherMonitor.load(tmp_path / "fisher.safetensors")
    assert not list(tmp_path.iterdir())
