"""The Lightning callback in Lightning's own Trainer, against a loop over single samples at every watched step."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from model_state import hooks
from oracles import assert_equal, per_sample_squared_norms, total, trace
from torch_secorder import FisherMonitor
from torch_secorder.errors import ArgumentError, CoupledSamplesError, LifecycleError, ShapeError
from torch_secorder.integrations.lightning import FisherCallback
from torch_secorder.noise_scale import gradient_noise_scale

lightning = pytest.importorskip("lightning.pytorch")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

pytestmark = [
    pytest.mark.slow,  # Lightning takes five seconds to import.
    pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::DeprecationWarning", "ignore:.*LeafSpec"),
]


class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, reduction: str = "mean", through_self: bool = True, norm: bool = False) -> None:
        super().__init__()
        layers = [nn.Linear(4, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.Tanh(), nn.Linear(6, 3)]
        self.net = nn.Sequential(*layers).double()
        self.loss_fn = nn.CrossEntropyLoss(reduction=reduction)
        self.through_self = through_self

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss_fn(self(x) if self.through_self else self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Recorder(lightning.Callback):  # type: ignore[misc, name-defined]
    """What every optimizer step was computed from: the samples, and the model before it."""

    def __init__(self) -> None:
        self.steps: list[tuple[nn.Module, Tensor, Tensor]] = []
        self.batches: list[Any] = []
        self.hooked: list[bool] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.hooked.append(hooked(pl_module))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        x, y = (torch.cat(parts) for parts in zip(*self.batches, strict=True))
        self.batches = []
        self.steps.append((copy.deepcopy(pl_module.net), x, y))


def hooked(model: nn.Module) -> bool:
    return any(hooks(model).values())


def fit(module: Any, callbacks: list[Any], folder: Path, n: int = 24, **options: Any) -> Any:
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,)))
    options = {"max_epochs": 1, "logger": False} | options
    trainer = lightning.Trainer(
        callbacks=callbacks,
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, DataLoader(data, batch_size=4))
    return trainer


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_every_watched_step_is_exact(reduction: str, accumulate: int, tmp_path: Path) -> None:
    module, recorder = Classifier(reduction), Recorder()
    callback = FisherCallback(every=2, reduction=reduction, by=None)
    fit(module, [callback, recorder], tmp_path, n=23, accumulate_grad_batches=accumulate)  # the last batch has 3
    watched = recorder.steps[::2]
    assert [row["step"] for row in callback.history] == list(range(0, len(recorder.steps), 2))
    for row, (net, x, y) in zip(callback.history, watched, strict=True):
        squared = per_sample_squared_norms(net, nn.CrossEntropyLoss(reduction=reduction), x, y)
        expected = trace(squared, reduction)
        everything = total(expected)
        assert_equal(torch.tensor(row["fisher_trace"], dtype=torch.float64), everything, everything)
        for name, value in expected.items():
            assert_equal(torch.tensor(row[f"fisher_trace/net.{name}"], dtype=torch.float64), value, everything)
        spread = torch.stack(list(squared.values())).sum(0).std() * len(x) ** (0.5 if reduction == "sum" else -0.5)
        assert row["fisher_trace_stderr"] == pytest.approx(float(spread), rel=1e-8)


class Flat(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.view(-1, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss_fn(self(x.flatten()), y)


def test_samples_that_the_user_counts(tmp_path: Path) -> None:
    plain, told = FisherCallback(every=2), FisherCallback(every=2, n_samples=4)
    module = Classifier()
    flat = Flat()
    flat.load_state_dict(module.state_dict())
    fit(module, [plain], tmp_path)
    fit(flat, [told], tmp_path)
    assert len(told.history) == len(plain.history) == 3
    for row, expected in zip(told.history, plain.history, strict=True):
        assert row == pytest.approx(expected, rel=1e-10)


def test_only_watched_steps_are_hooked_and_training_is_the_same(tmp_path: Path) -> None:
    module, recorder = Classifier(), Recorder()
    plain = copy.deepcopy(module)
    fit(module, [FisherCallback(every=3), recorder], tmp_path)
    assert recorder.hooked == [True, False, False, True, False, False]
    assert not hooked(module)
    fit(plain, [], tmp_path)
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_part_that_the_step_calls(tmp_path: Path) -> None:
    recorder, callback = Recorder(), FisherCallback(module="net", by="module")
    module = Classifier(through_self=False)
    fit(module, [callback, recorder], tmp_path)
    net, x, y = recorder.steps[0]
    expected = total(trace(per_sample_squared_norms(net, nn.CrossEntropyLoss(), x, y)))
    assert_equal(torch.tensor(callback.history[0]["fisher_trace"], dtype=torch.float64), expected, expected)
    assert {"fisher_trace/0", "fisher_trace/2"} < set(callback.history[0])
    with pytest.raises(ShapeError, match="monitor the part that is called"):
        fit(module, [FisherCallback()], tmp_path)
    assert not hooked(module)


@pytest.mark.parametrize("decay", [0.0, 0.5, None])
def test_noise_scale_is_that_of_the_steps_batches(decay: float | None, tmp_path: Path) -> None:
    """Its parts are those of plain monitors around the same batches, averaged over steps before they are divided."""
    recorder, callback = Recorder(), FisherCallback(every=1, noise_decay=decay)
    fit(Classifier(), [callback, recorder], tmp_path, n=48, accumulate_grad_batches=3)
    signal = noise = 0.0
    for row, (net, x, y) in zip(callback.history, recorder.steps, strict=True):
        if decay is None:
            assert not [name for name in row if "noise" in name]
            continue
        with FisherMonitor(net) as monitor:
            for index in torch.arange(len(x)).split(4):
                nn.functional.cross_entropy(net(x[index]), y[index]).backward()
        parts = gradient_noise_scale(monitor.report(), by="model").loc["model"]
        signal = decay * signal + parts["true_grad_sq_norm"]
        noise = decay * noise + parts["noise_trace"]
        expected = noise / signal if signal > 0 else float("nan")
        assert row.get("noise_scale", float("nan")) == pytest.approx(expected, rel=1e-8, nan_ok=True)


def test_numbers_reach_loggers_and_callback_metrics(tmp_path: Path) -> None:
    logger = lightning.loggers.CSVLogger(tmp_path)
    callback = FisherCallback(every=2)
    trainer = fit(Classifier(), [callback], tmp_path, logger=logger, log_every_n_steps=1)
    logger.save()
    written = pd.read_csv(Path(logger.log_dir) / "metrics.csv").dropna(subset="fisher_trace")
    assert list(written["step"]) == [row["step"] for row in callback.history] == [0, 2, 4]
    for name in ("fisher_trace", "fisher_trace_stderr", "fisher_trace/net.0", "fisher_trace/net.2"):
        assert list(written[name]) == pytest.approx([row[name] for row in callback.history])
    assert float(trainer.callback_metrics["fisher_trace"]) == pytest.approx(callback.history[-1]["fisher_trace"])


def test_a_gradient_scaler_is_undone(tmp_path: Path) -> None:
    from lightning.pytorch.plugins.precision import Precision

    class Scaled(Precision):  # type: ignore[misc]
        """What 16-mixed does, on a CPU and in float64."""

        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def pre_backward(self, tensor: Tensor, module: Any) -> Tensor:
            return super().pre_backward(self.scaler.scale(tensor), module)

    recorder, callback = Recorder(), FisherCallback(every=100)
    fit(Classifier(), [callback, recorder], tmp_path, plugins=[Scaled()], accumulate_grad_batches=2)
    net, x, y = recorder.steps[0]
    expected = total(trace(per_sample_squared_norms(net, nn.CrossEntropyLoss(), x, y)))
    assert_equal(torch.tensor(callback.history[0]["fisher_trace"], dtype=torch.float64), expected, expected)


def test_refusals_in_words(tmp_path: Path) -> None:
    for every in (0, -1, True, 1.5):
        with pytest.raises(ArgumentError, match="every must be a positive number"):
            FisherCallback(every=every)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="by must be"):
        FisherCallback(by="layer")
    with pytest.raises(ArgumentError, match="noise_decay must be"):
        FisherCallback(noise_decay=1.0)
    with pytest.raises(
        ArgumentError, match="module must be the dotted name of a part of the Classifier, not 'nothing'"
    ):
        fit(Classifier(), [FisherCallback(module="nothing")], tmp_path)
    module = Classifier(norm=True)
    with pytest.raises(CoupledSamplesError, match="BatchNorm"):
        fit(module, [FisherCallback()], tmp_path)
    assert not hooked(module)
    manual = Classifier()
    manual.automatic_optimization = False
    with pytest.raises(LifecycleError, match="manual optimization"):
        fit(manual, [FisherCallback()], tmp_path)
