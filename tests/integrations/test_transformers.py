"""The Trainer callback in the real Trainer, against a loop over single samples at every watched step."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from model_state import hooks
from torch_secorder import FisherMonitor
from torch_secorder.errors import ArgumentError, CoupledSamplesError, LifecycleError
from torch_secorder.integrations.transformers import FisherCallback
from torch_secorder.noise_scale import gradient_noise_scale

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")]

Sample = dict[str, Tensor]


class Config(PreTrainedConfig):
    model_type = "plain"


class Classifier(PreTrainedModel):
    """A model whose forward takes no ``num_items_in_batch``: its loss is a mean over the micro-batch."""

    config_class = Config

    def __init__(self, config: Config, norm: bool = False):
        super().__init__(config)
        layers = [nn.Linear(4, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.Tanh(), nn.Linear(6, 3)]
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.net(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def classifier(**options: Any) -> Classifier:
    return Classifier(Config(), **options).double()


def language_model() -> GPT2LMHeadModel:
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(loss_type="ForCausalLM", **sizes, **plain)).double()


def images(n: int) -> list[Sample]:
    return [{"x": torch.randn(4, dtype=torch.float64), "labels": torch.randint(3, ())} for _ in range(n)]


def texts(n: int) -> list[Sample]:
    """Sequences with different numbers of labels, so that a mean over samples is not a mean over tokens."""
    samples = []
    for number in range(n):
        ids = torch.randint(11, (7,))
        labels = ids.clone()
        labels[: 1 + number % 5] = -100
        samples.append({"input_ids": ids, "labels": labels})
    return samples


class Recorder(TrainerCallback):
    """The model before every optimizer step, and whether it is hooked at each micro-batch."""

    def __init__(self) -> None:
        self.models: list[nn.Module] = []
        self.hooked: list[bool] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.hooked.append(hooked(model))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.models.append(copy.deepcopy(model))


def hooked(model: nn.Module) -> bool:
    return any(hooks(model).values())


class InOrder(Trainer):
    """Doesn't shuffle, so that the oracle knows the samples of each step."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_for(
    model: nn.Module,
    samples: list[Sample],
    callbacks: list[Any],
    folder: Path,
    trainer_class: Any = InOrder,
    **options: Any,
) -> Any:
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "num_train_epochs": 1,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.1,
            "logging_steps": 1,
            "dataloader_pin_memory": False,
        }
        | options
    )
    return InOrder(model=model, args=arguments, train_dataset=samples, callbacks=callbacks)


def steps_of(samples: list[Sample], size: int, accumulate: int) -> list[list[list[Sample]]]:
    """The samples by optimizer step and micro-batch, as an epoch in order has them."""
    batches = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]


def single(sample: Sample) -> Sample:
    return {name: value.unsqueeze(0) for name, value in sample.items()}


def mean_shares(model: nn.Module, step: list[list[Sample]]) -> list[Tensor]:
    """s_n where the step's loss is the mean over micro-batches of their means."""
    return [model(**single(sample)).loss / (len(step) * len(batch)) for batch in step for sample in batch]


def token_shares(model: nn.Module, step: list[list[Sample]]) -> list[Tensor]:
    """s_n where the step's loss is a sum over tokens over the number of labels of the whole step.

    The Trainer counts a sequence's first label, which no model predicts, if it isn't -100; here it always is.
    """
    samples = [sample for batch in step for sample in batch]
    items = sum(int(sample["labels"].ne(-100).sum()) for sample in samples)
    shares = []
    for sample in samples:
        logits = model(input_ids=sample["input_ids"].unsqueeze(0)).logits[0].float()
        shares.append(nn.functional.cross_entropy(logits[:-1], sample["labels"][1:], reduction="sum") / items)
    return shares


def squared_norms(model: nn.Module, shares: list[Tensor]) -> dict[str, Tensor]:
    """||grad l_n||^2 for l_n = N s_n, [n] per parameter."""
    named = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(len(shares) * share, list(named.values()), retain_graph=True, allow_unused=True)
        for share in shares
    ]
    return {
        name: torch.stack([torch.zeros(()).double() if row[p] is None else row[p].square().sum() for row in rows])
        for p, name in enumerate(named)
    }


CASES = {
    "means": (classifier, images, mean_shares, 1e-8),
    "num_items_in_batch": (language_model, texts, token_shares, 1e-6),  # transformers casts logits to float32
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("case", list(CASES))
def test_every_watched_step_is_exact(case: str, accumulate: int, tmp_path: Path) -> None:
    make, data, shares_of, rtol = CASES[case]
    model, samples, recorder = make(), data(13), Recorder()  # the last micro-batch has one sample
    callback = FisherCallback(every=2, by=None)
    trainer = trainer_for(
        model,
        samples,
        [callback, recorder],
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
    )
    assert trainer.model_accepts_loss_kwargs == (case == "num_items_in_batch")
    trainer.train()
    steps = steps_of(samples, 2, accumulate)
    assert len(recorder.models) == len(steps)
    assert [row["step"] for row in callback.history] == list(range(1, len(steps) + 1, 2))
    for row, before, step in zip(callback.history, recorder.models[::2], steps[::2], strict=True):
        squared = squared_norms(before, shares_of(before, step))
        everything = torch.stack(list(squared.values())).sum(0)
        assert row["fisher_trace"] == pytest.approx(float(everything.mean()), rel=rtol)
        for name, t in squared.items():
            # Key biases have no gradient but rounding.
            close = pytest.approx(float(t.mean()), rel=rtol, abs=1e-12 * float(everything.mean()))
            assert row[f"fisher_trace/{name}"] == close, name
        if len(everything) > 1:
            stderr = float(everything.std()) / math.sqrt(len(everything))
            assert row["fisher_trace_stderr"] == pytest.approx(stderr, rel=rtol)
        else:
            assert "fisher_trace_stderr" not in row


class Graphs(PreTrainedModel):
    """Rows are nodes, and a graph's prediction is the sum over its nodes."""

    config_class = Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor, graph: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        logits = x.new_zeros(len(labels), 3).index_add(0, graph, self.net(x))
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def collated(samples: list[Sample]) -> Sample:
    """The nodes of all graphs one after the other, as PyTorch Geometric has them."""
    graph = torch.cat([torch.full((len(sample["x"]),), number) for number, sample in enumerate(samples)])
    labels = torch.stack([sample["labels"] for sample in samples])
    return {"x": torch.cat([sample["x"] for sample in samples]), "graph": graph, "labels": labels}


def test_samples_that_the_user_counts(tmp_path: Path) -> None:
    sizes = [3, 1, 4, 2, 2, 5, 1, 3]
    samples = [{"x": torch.randn(k, 4, dtype=torch.float64), "labels": torch.randint(3, ())} for k in sizes]
    model, recorder, callback = Graphs(Config()).double(), Recorder(), FisherCallback(every=1, sample_of="graph")
    trainer = trainer_for(model, samples, [callback, recorder], tmp_path, per_device_train_batch_size=4)
    trainer.data_collator = collated
    trainer.train()
    assert len(callback.history) == len(recorder.models) == 2
    for row, before, part in zip(callback.history, recorder.models, (samples[:4], samples[4:]), strict=True):
        shares = [before(**collated([sample])).loss / 4 for sample in part]
        everything = torch.stack(list(squared_norms(before, shares).values())).sum(0)
        assert row["fisher_trace"] == pytest.approx(float(everything.mean()), rel=1e-8)


def test_micro_batches_give_what_one_batch_gives(tmp_path: Path) -> None:
    """The point of num_items_in_batch: 2 x 3 samples are 1 x 6, here and in a plain monitor with a plain loss."""
    model, samples = language_model(), texts(6)
    rows = []
    for size, accumulate in ((6, 1), (2, 3), (1, 6)):
        callback = FisherCallback(by=None)
        trainer_for(
            copy.deepcopy(model),
            samples,
            [callback],
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
        ).train()
        assert callback.report is not None
        rows.append(callback.report["fisher_trace"])
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    with FisherMonitor(model) as monitor:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].transpose(1, 2)
        nn.functional.cross_entropy(logits, batch["labels"][:, 1:]).backward()
    expected = monitor.report()["fisher_trace"]
    for row in rows:
        assert (row - expected).abs().max() < 1e-7 * expected.sum()  # transformers casts logits to float32


def test_only_watched_steps_are_hooked_and_training_is_the_same(tmp_path: Path) -> None:
    model, samples, recorder = classifier(), images(24), Recorder()
    plain = copy.deepcopy(model)
    trainer_for(model, samples, [FisherCallback(every=2), recorder], tmp_path, per_device_train_batch_size=4).train()
    assert recorder.hooked == [True, False, True, False, True, False]
    assert not hooked(model)
    trainer_for(plain, samples, [], tmp_path, per_device_train_batch_size=4).train()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_noise_scale_of_equal_micro_batches_only(tmp_path: Path) -> None:
    callback = FisherCallback()
    model, samples = classifier(), images(12)
    before = copy.deepcopy(model)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    trainer_for(model, samples, [callback], tmp_path, **options).train()
    monitor = FisherMonitor(before)
    for (batch,) in steps_of(samples, 4, 1):
        with monitor:
            before(**{name: torch.stack([sample[name] for sample in batch]) for name in batch[0]}).loss.backward()
    assert callback.report is not None
    found, expected = (gradient_noise_scale(report, by="model") for report in (callback.report, monitor.report()))
    for column in ("true_grad_sq_norm", "noise_trace"):
        assert found[column].iloc[0] == pytest.approx(expected[column].iloc[0], rel=1e-10)
    scale = float(expected["noise_scale"].iloc[0])
    assert callback.history[0].get("noise_scale", math.nan) == pytest.approx(scale, rel=1e-10, nan_ok=True)
    for n in (11, 3):  # sizes 4, 4, 3; then single samples
        unequal = FisherCallback()
        options["per_device_train_batch_size"] = 4 if n == 11 else 1
        trainer_for(classifier(), images(n), [unequal], tmp_path, **options).train()
        assert not [name for name in unequal.history[0] if "noise" in name]


def test_numbers_go_where_the_trainer_reports_to(tmp_path: Path) -> None:
    class Reporter(TrainerCallback):
        seen: list[dict[str, Any]] = []  # noqa: RUF012 # one test, one list

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen.append(dict(logs))

    callback = FisherCallback(every=2, by="module")
    trainer = trainer_for(classifier(), images(16), [callback, Reporter()], tmp_path, per_device_train_batch_size=4)
    callback.log = trainer.log
    trainer.train()
    reported = [logs for logs in Reporter.seen if "fisher_trace/net.0" in logs]
    kept = [row for row in trainer.state.log_history if "fisher_trace/net.0" in row]
    assert [row["step"] for row in kept] == [1, 3]
    for logs, row, mine in zip(reported, kept, callback.history, strict=True):
        assert logs["fisher_trace"] == row["fisher_trace"] == mine["fisher_trace"]

    quiet = FisherCallback(every=2)
    trainer = trainer_for(classifier(), images(16), [quiet], tmp_path, per_device_train_batch_size=4)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "fisher_trace" in row] == [1, 3]


def test_a_gradient_scaler_is_undone(tmp_path: Path) -> None:
    callback = FisherCallback(every=100)
    model, samples = classifier(), images(6)
    before = copy.deepcopy(model)
    trainer = trainer_for(model, samples, [callback], tmp_path, per_device_train_batch_size=3, max_grad_norm=0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # that of fp16, which wants a GPU
    trainer.train()
    everything = sum(squared_norms(before, mean_shares(before, [samples[:3]])).values())
    assert callback.history[0]["fisher_trace"] == pytest.approx(float(everything.mean()), rel=1e-8)


def test_bfloat16_autocast_is_near(tmp_path: Path) -> None:
    callback = FisherCallback(every=100)
    model, samples = classifier().float(), images(8)
    samples = [sample | {"x": sample["x"].float()} for sample in samples]
    before = copy.deepcopy(model)
    trainer_for(model, samples, [callback], tmp_path, per_device_train_batch_size=8, bf16=True).train()
    everything = sum(squared_norms(before, mean_shares(before, [samples])).values())
    assert callback.history[0]["fisher_trace"] == pytest.approx(float(everything.mean()), rel=0.03)


def test_after_an_error_close_takes_the_hooks_off(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model, callback = classifier(), FisherCallback()
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = trainer_for(model, images(8), [callback, Fails()], tmp_path, **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert hooked(model)
    callback.close()
    assert not hooked(model)


def test_refusals_in_words(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="every must be a positive number"):
        FisherCallback(every=0)
    callback, model = FisherCallback(), classifier(norm=True)
    with pytest.raises(CoupledSamplesError, match="BatchNorm"):
        trainer_for(model, images(8), [callback], tmp_path).train()
    callback.close()
    assert not hooked(model)
    for arguments, words in (
        ({"n_gpu": 2}, "CUDA_VISIBLE_DEVICES"),
        ({"world_size": 4}, "4 processes"),
        ({"deepspeed": "zero.json"}, "DeepSpeed"),
    ):
        args = SimpleNamespace(**{"n_gpu": 1, "world_size": 1, "deepspeed": None, "fp16": False} | arguments)
        with pytest.raises(LifecycleError, match=words):
            FisherCallback().on_train_begin(args, None, None, model=classifier())
