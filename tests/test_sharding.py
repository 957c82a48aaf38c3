"""Models that ranks hold together: every rank gets the table of one process that has the model in one piece."""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import sharded
from ranks import on_ranks
from sharded import SETUPS, SIZES, Setup, Transformer, batch, fully_sharded, loss, made, mlp, turns
from torch_secorder import FisherMonitor, fisher_report, generalized_fisher_trace, hessian_trace
from torch_secorder.errors import CoverageError, CurvatureError, UnsupportedError

pytestmark = pytest.mark.slow

ABOUT = ["module", "module_type", "shape", "numel"]
FIGURES = ["fisher_trace", "fisher_trace_stderr", "grad_sq_norm"]


def watch(setup: Setup, model: nn.Module, numbers: Any) -> FisherMonitor:
    with FisherMonitor(model, **setup.watched) as monitor:
        for place, number in enumerate(numbers):
            waits = setup.accumulates and place % 2 == 0
            if waits and isinstance(model, DistributedDataParallel):
                context = model.no_sync()
            else:
                context = nullcontext()
                if setup.accumulates and hasattr(model, "set_requires_gradient_sync"):
                    model.set_requires_gradient_sync(not waits)
            with context:
                loss(setup, model, number).backward()
    return monitor


def kept(monitor: FisherMonitor) -> dict[str, Any]:
    """What a monitor says, beside its table."""
    names = [name for name, wanted in monitor.results.statistics.keeps.items() if wanted]
    return {name: getattr(monitor, name) for name in names}


def result(setup: Setup, mesh: DeviceMesh, ranks: int, rank: int) -> dict[str, Any]:
    monitor = watch(setup, setup.spread(made(setup.model, _stored(setup)), mesh), turns(setup, ranks, rank))
    synced = monitor.report(sync=True)
    report = monitor.all_reduce().report()
    pd.testing.assert_frame_equal(synced, report)
    return {"report": report, **kept(monitor)}


def _stored(setup: Setup) -> torch.dtype:
    return torch.float32 if setup.dtype == torch.bfloat16 else setup.dtype


def expected(setup: Setup, ranks: int) -> dict[str, Any]:
    model = made(setup.model, _stored(setup)).to(setup.dtype)
    monitor = watch(setup, model, [n for rank in range(ranks) for n in turns(setup, ranks, rank)])
    return {"report": monitor.report(), **kept(monitor)}


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    report, other = found["report"], wanted["report"]
    pd.testing.assert_frame_equal(report[ABOUT], other[ABOUT])
    assert report.attrs == pytest.approx(other.attrs)
    for column in FIGURES:  # relative to the total: gradients that are zero by symmetry are rounding
        atol = 1e-12 * other[column].sum()
        pd.testing.assert_series_equal(report[column], other[column], rtol=1e-6, atol=atol)
    if "diagonal" in wanted:
        torch.testing.assert_close(found["diagonal"], wanted["diagonal"], rtol=1e-6, atol=1e-12)
    for name in {"per_sample", "activations"} & set(wanted):
        pd.testing.assert_frame_equal(found[name], wanted[name], rtol=1e-6, atol=1e-12)


# Two ranks


def on_two_ranks(rank: int, world: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    mesh = init_device_mesh("cpu", (world,))
    # Ranks of a tensor-parallel group see the same batches.
    found: dict[str, Any] = {
        name: result(setup, mesh, *((1, 0) if name.startswith("tensor") else (world, rank)))
        for name, setup in SETUPS.items()
    }
    return found | {name: check(mesh, rank) for name, check in CHECKS.items()}


def uneven_batches(mesh: DeviceMesh, rank: int) -> Any:
    """All batches are the first rank's."""
    model = DistributedDataParallel(made(mlp))
    with Join([model]):
        monitor = watch(Setup(mlp, sharded.replicated), model, range(len(SIZES)) if rank == 0 else [])
    return {"report": monitor.report(sync=True)}


def gradients(mesh: DeviceMesh, rank: int) -> Any:
    """The user's gradients with a monitor and without, over three steps."""
    found = []
    for watched in (False, True):
        model = fully_sharded(made(Transformer), mesh)
        with FisherMonitor(model) if watched else nullcontext():
            for number in turns(SETUPS["FSDP2"], 2, rank):
                F.cross_entropy(model(batch(number, Transformer)[0]), batch(number, Transformer)[1]).backward()
        found.append([p.grad.full_tensor() for p in model.parameters()])
    return all(map(torch.equal, *found))


def functions(mesh: DeviceMesh, rank: int) -> Any:
    """Reports and traces of one rank's own data, which leave no gradient."""
    spread, alone = fully_sharded(made(Transformer), mesh), made(Transformer)
    data = [batch(rank, Transformer), batch(2, Transformer)]
    options = [{"loss_fn": nn.CrossEntropyLoss()}, {"loss_fn": None, "fisher": "exact"}]
    options += [{"loss_fn": nn.CrossEntropyLoss(), "parameters": "all"}]
    found = []
    for choice in options:
        pairs = [fisher_report(model, data=data, progress=False, **choice) for model in (spread, alone)]
        found.append([frame[FIGURES[:2]].to_numpy() for frame in pairs])
    x, y = data[0]
    found.append([generalized_fisher_trace(model, model(x), y).detach().numpy() for model in (spread, alone)])
    return found, all(p.grad is None for p in spread.parameters())


def sampled(mesh: DeviceMesh, rank: int) -> Any:
    """Tensor-parallel ranks draw one label for a sample, though each was asked with a generator of its own."""
    model = sharded.tensor_parallel(made(Transformer), mesh)
    data = [batch(2, Transformer)]
    generator = torch.Generator().manual_seed(rank)
    report = fisher_report(model, None, data, fisher="sampled", num_samples=64, generator=generator, progress=False)
    exact = fisher_report(made(Transformer), None, data, fisher="exact", progress=False)
    return report["fisher_trace"].sum(), exact["fisher_trace"].sum()


def refused(mesh: DeviceMesh, rank: int) -> Any:
    """The kind and the text of every error."""
    told = {}
    for name, attempt in REFUSED.items():
        try:
            attempt(mesh, rank)
        except CurvatureError as error:
            told[name] = (type(error), str(error))
    return told


def penalty(mesh: DeviceMesh, rank: int) -> None:
    model = fully_sharded(made(mlp), mesh)
    with FisherMonitor(model):
        (loss(SETUPS["FSDP2"], model, 0) + model[0].weight.full_tensor().square().sum()).backward()


def flattened(mesh: DeviceMesh, rank: int) -> None:
    FisherMonitor(FullyShardedDataParallel(made(mlp), device_id=torch.device("cpu")))


def curved(mesh: DeviceMesh, rank: int) -> None:
    x, y = batch(0, mlp)
    hessian_trace(fully_sharded(made(mlp), mesh), nn.CrossEntropyLoss(), x, y)


def forgotten(mesh: DeviceMesh, rank: int) -> None:
    watch(SETUPS["tensor"], sharded.split_and_forgotten(made(Transformer), mesh), [0])


def parts_of_outputs(mesh: DeviceMesh, rank: int) -> None:
    setup = Setup(Transformer, sharded.tensor_parallel, {"activations": True})
    watch(setup, setup.spread(made(Transformer), mesh), [0])


def more_batches(mesh: DeviceMesh, rank: int) -> None:
    model = fully_sharded(made(mlp), mesh)
    fisher_report(model, nn.CrossEntropyLoss(), [batch(n, mlp) for n in range(2 + rank)], progress=False)


def refused_elsewhere(mesh: DeviceMesh, rank: int) -> None:
    """One rank's model returns nothing that shows where its samples are."""
    model = fully_sharded(made(Transformer), mesh)
    if rank:
        model.register_forward_hook(lambda module, args, output: output.sum())
    watch(SETUPS["FSDP2, transformer"], model, [0])


CHECKS = {check.__name__: check for check in (uneven_batches, gradients, functions, sampled, refused)}
WRONG = (penalty, flattened, curved, forgotten, parts_of_outputs, more_batches, refused_elsewhere)
REFUSED = {check.__name__: check for check in WRONG}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    made(sharded.Language)  # With what it imports here, the ranks start.
    return on_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", SETUPS)
def test_every_rank_gets_the_table_of_one_process(name: str, two: list[dict[str, Any]]) -> None:
    wanted = expected(SETUPS[name], 1 if name.startswith("tensor") else 2)
    for found in two:
        compare(found[name], wanted)


def test_a_rank_without_samples(two: list[dict[str, Any]]) -> None:
    alone = watch(Setup(mlp, sharded.replicated), made(mlp), range(len(SIZES)))
    for found in two:
        compare(found["uneven_batches"], {"report": alone.report()})


def test_the_gradients_of_the_user_stay_the_same_bit_by_bit(two: list[dict[str, Any]]) -> None:
    assert all(found["gradients"] for found in two)


def test_functions_of_a_sharded_model(two: list[dict[str, Any]]) -> None:
    for found in two:
        pairs, clean = found["functions"]
        assert clean
        for spread, alone in pairs:
            torch.testing.assert_close(torch.tensor(spread), torch.tensor(alone), rtol=1e-9, atol=1e-15)


def test_ranks_of_a_tensor_parallel_group_draw_the_same_labels(two: list[dict[str, Any]]) -> None:
    (first, exact), (second, _) = (found["sampled"] for found in two)
    assert first == second
    assert first == pytest.approx(exact, rel=0.25)


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("penalty", CoverageError, "0.weight is not the sum"),
        ("flattened", UnsupportedError, "fully_shard"),
        ("curved", UnsupportedError, "'0.weight' only"),
        ("forgotten", CoverageError, "norm.weight.*SequenceParallel"),
        ("parts_of_outputs", UnsupportedError, "words.*in parts on several ranks"),
        ("more_batches", CoverageError, "more batches than others"),
        ("refused_elsewhere", CurvatureError, "another rank|return the outputs along with the loss"),
    ],
)
def test_refusals(name: str, kind: type[Exception], text: str, two: list[dict[str, Any]]) -> None:
    for found in two:
        assert issubclass(found["refused"][name][0], kind)
        assert re.search(text, found["refused"][name][1])


# Four ranks


def on_four_ranks(rank: int, world: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return {
        "both": result(BOTH, mesh, 2, mesh["data"].get_local_rank()),
        "four": result(FOUR, init_device_mesh("cpu", (world,)), 4, rank),
    }


BOTH = Setup(Transformer, sharded.both, {"per_sample": True}, steps=2)
# Of the six rows of a weight, the last rank has none.
FOUR = Setup(mlp, fully_sharded, {"diagonal": True, "per_sample": True}, steps=2)


def test_four_ranks(tmp_path: Path) -> None:
    both, four = expected(BOTH, 2), expected(FOUR, 4)
    for found in on_ranks(on_four_ranks, 4, tmp_path):
        compare(found["both"], both)
        compare(found["four"], four)
