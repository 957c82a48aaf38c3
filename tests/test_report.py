"""The table: its columns, order, names, types and attrs, and that its rows sum to the total."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from problems import BY_NAME, PROBLEMS, Problem
from torch_secorder import FisherMonitor
from torch_secorder.errors import CurvatureError

COLUMNS = [
    "module",
    "module_type",
    "shape",
    "numel",
    "fisher_trace",
    "fisher_trace_stderr",
    "fisher_trace_share",
    "fisher_mean",
    "grad_sq_norm",
    "rule",
]
GROUP_COLUMNS = ["n_parameters", "numel", *COLUMNS[4:]]

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def monitored(problem: Problem, reduction: str = "mean", **options: Any) -> tuple[nn.Module, FisherMonitor]:
    setting = problem.setting()
    with FisherMonitor(setting.model, reduction=reduction, **options) as monitor:
        setting.loss(reduction).backward()
    return setting.model, monitor


# Those whose parameters are in several modules, under several names, or shared; a table doesn't know what a layer computes.
@pytest.mark.parametrize(
    "problem", [p for p in PROBLEMS if p.name.startswith(("tied", "reused", "frozen", "use"))], ids=str
)
def test_rows_sum_to_the_total(problem: Problem) -> None:
    model, monitor = monitored(problem)
    report = monitor.report()
    trace = float(monitor.trace)
    assert list(report.index) == [name for name, p in model.named_parameters() if p.requires_grad]
    assert report["fisher_trace"].sum() == pytest.approx(trace, rel=1e-12)
    assert report["fisher_trace_share"].sum() == pytest.approx(1, rel=1e-12)
    assert report["numel"].sum() == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for by in ("module", "type", lambda name: name[-1]):
        grouped = monitor.report(by=by)
        assert grouped["fisher_trace"].sum() == pytest.approx(trace, rel=1e-12)
        assert grouped["fisher_trace_share"].sum() == pytest.approx(1, rel=1e-12)
        assert grouped["n_parameters"].sum() == len(report)
        assert grouped["numel"].sum() == report["numel"].sum()
        assert grouped["grad_sq_norm"].sum() == pytest.approx(report["grad_sq_norm"].sum(), rel=1e-9)


def test_columns_in_order_with_their_types() -> None:
    model, monitor = monitored(BY_NAME["use-vision_net"])
    report = monitor.report()
    assert list(report.columns) == COLUMNS
    assert report.index.name == "parameter"
    assert isinstance(report, pd.DataFrame)
    for name, p in model.named_parameters():
        row = report.loc[name]
        assert row["module"] == name.rpartition(".")[0]
        assert row["module_type"] == type(model.get_submodule(row["module"])).__name__
        assert row["shape"] == tuple(p.shape)
        assert type(row["shape"]) is tuple
        assert all(type(size) is int for size in row["shape"])
        assert row["numel"] == p.numel()
        assert row["fisher_mean"] == pytest.approx(row["fisher_trace"] / p.numel())
        assert row["fisher_trace_share"] == pytest.approx(row["fisher_trace"] / float(monitor.trace))
        assert isinstance(row["rule"], str)
        assert row["rule"] not in ("", "unused")
    assert pd.api.types.is_integer_dtype(report["numel"])
    assert all(report[figure].dtype == np.float64 for figure in COLUMNS[4:9])


@pytest.mark.parametrize(("by", "index_name"), [("module", "module"), ("type", "type"), (len, "group")])
def test_grouped_columns(by: Any, index_name: str) -> None:
    _, monitor = monitored(BY_NAME["use-vision_net"])
    grouped, report = monitor.report(by=by), monitor.report()
    assert list(grouped.columns) == GROUP_COLUMNS
    assert grouped.index.name == index_name
    keys = {"module": report["module"], "type": report["module_type"], "group": report.index.map(len)}[index_name]
    assert list(grouped.index) == list(dict.fromkeys(keys)), "in order of first appearance"
    for group, row in grouped.iterrows():
        members = report[np.asarray(keys == group)]
        assert row["n_parameters"] == len(members)
        assert row["numel"] == members["numel"].sum()
        assert row["fisher_trace"] == pytest.approx(members["fisher_trace"].sum())
        assert row["fisher_mean"] == pytest.approx(members["fisher_trace"].sum() / members["numel"].sum())
        assert row["grad_sq_norm"] == pytest.approx(members["grad_sq_norm"].sum())
    assert pd.api.types.is_integer_dtype(grouped["numel"])
    assert pd.api.types.is_integer_dtype(grouped["n_parameters"])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_attrs(reduction: str) -> None:
    _, monitor = monitored(BY_NAME["linear-2d"], reduction)
    for by in (None, "module", "type", str):
        attrs = monitor.report(by=by).attrs
        assert {key: attrs[key] for key in ("reduction", "fisher", "n_samples", "n_passes")} == {
            "reduction": reduction,
            "fisher": "empirical",
            "n_samples": 5,
            "n_passes": 1,
        }


def test_the_root_modules_own_parameters() -> None:
    _, monitor = monitored(BY_NAME["linear-2d"])
    report = monitor.report()
    assert list(report.index) == ["weight", "bias"]
    assert list(report["module"]) == ["", ""]
    assert list(report["module_type"]) == ["Linear", "Linear"]
    assert list(monitor.report(by="module").index) == [""]


def test_tied_parameters_have_one_row_under_the_first_name() -> None:
    _, monitor = monitored(BY_NAME["tied-embedding_and_head_with_bias"])
    report = monitor.report()
    assert list(report.index) == ["embedding.weight", "block.weight", "block.bias", "head.bias"]
    assert list(report["module_type"]) == ["Embedding", "Linear", "Linear", "Linear"]


def test_frozen_parameters_have_no_row() -> None:
    _, monitor = monitored(BY_NAME["frozen-first_weight"])
    assert list(monitor.report().index) == ["0.bias", "2.weight", "2.bias", "3.weight", "3.bias"]


def test_a_total_of_zero_has_no_shares() -> None:
    model = nn.Linear(4, 3)
    with FisherMonitor(model) as monitor:
        (model(torch.randn(5, 4)) * 0).sum().backward()
    report = monitor.report()
    assert list(report["fisher_trace"]) == [0, 0]
    assert all(math.isnan(share) for share in report["fisher_trace_share"])


@pytest.mark.parametrize("by", ["modules", "", 3, ["module"]])
def test_an_unknown_grouping_is_an_argument_error(by: Any) -> None:
    _, monitor = monitored(BY_NAME["linear-2d"])
    with pytest.raises(CurvatureError, match=r"by.*module.*type|module.*type.*by") as raised:
        monitor.report(by=by)
    assert isinstance(raised.value, ValueError)


def test_reports_are_the_callers_own() -> None:
    _, monitor = monitored(BY_NAME["linear-2d"])
    spoiled = monitor.report()
    spoiled.loc[:, "fisher_trace"] = -1.0
    spoiled.attrs.clear()
    assert (monitor.report()["fisher_trace"] > 0).all()
    assert monitor.report().attrs["n_samples"] == 5


class Wrapped(nn.Module):
    """Stands in for a wrapper that keeps the model under a name of its own."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_a_submodule_that_is_merely_called_module_keeps_its_name() -> None:
    model = Wrapped(nn.Linear(4, 3))
    with FisherMonitor(model) as monitor:
        model(torch.randn(5, 4)).sum().backward()
    assert list(monitor.report().index) == ["module.weight", "module.bias"]


def test_wrappers_are_not_in_the_names(tmp_path: Path) -> None:
    """DistributedDataParallel adds "module.", torch.compile "_orig_mod."."""
    import torch.distributed as dist

    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    compiled = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), backend="eager")
    with FisherMonitor(compiled) as monitor:
        compiled._orig_mod(torch.randn(5, 4)).sum().backward()
    assert list(monitor.report().index) == names
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
        with FisherMonitor(wrapped) as monitor:
            wrapped(torch.randn(5, 4)).sum().backward()
        assert list(monitor.report().index) == names
        assert list(monitor.report()["module"]) == ["0", "0", "1", "1"]
        assert monitor.n_samples == 5
    finally:
        dist.destroy_process_group()


def test_checkpoint_wrappers_are_not_in_the_names() -> None:
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model = nn.Sequential(nn.Linear(4, 4), wrapper.CheckpointWrapper(nn.Linear(4, 3)))
    with FisherMonitor(model) as monitor:
        model(torch.randn(5, 4)).sum().backward()
    assert list(monitor.report().index) == ["0.weight", "0.bias", "1.weight", "1.bias"]
