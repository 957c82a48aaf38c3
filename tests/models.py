"""Real architectures at their real code, as data: tiny random configurations, nothing is downloaded.

Every one must come out exact, or say in `refusal` what a CurvatureError about it reads like.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, rnn

from oracles import Inputs, assert_equal, call, double_copy, mapped, relative_error, trace
from problems._base import Forward, seed
from torch_secorder import FisherMonitor, fisher_report
from torch_secorder.errors import CurvatureError

Loss = Callable[[Any, Tensor], Tensor]


# Losses: means over samples


def main_output(outputs: Any) -> Tensor:
    """What the loss is about: the tensor itself, the logits, or the first of several outputs."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, rnn.PackedSequence):
        return outputs.data
    for name in ("logits", "last_hidden_state"):
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if found is not None:
            return found
    return outputs[0]


def of_classes(outputs: Any, targets: Tensor) -> Tensor:
    """Cross-entropy, averaged over samples and over the positions of each, of logits whose classes are last."""
    return F.cross_entropy(main_output(outputs).movedim(-1, 1), targets)


def of_numbers(outputs: Any, targets: Tensor, batch_axis: int = 0) -> Tensor:
    """Squared error: summed over each sample's elements, averaged over samples."""
    return (main_output(outputs) - targets).square().movedim(batch_axis, 0).flatten(1).sum(1).mean()


@contextmanager
def at_full_width(dtype: torch.dtype) -> Iterator[None]:
    """In float64, casts to float32 are casts to float64: norms that are always taken in float32 hide what float64 shows."""

    def at_least_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        wide = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        return lambda *args, **kwargs: function(*map(wide, args), **{key: wide(x) for key, x in kwargs.items()})

    if dtype != torch.float64:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Tensor, "to", at_least_float32(Tensor.to)))
        stack.enter_context(mock.patch.object(Tensor, "float", Tensor.double))
        stack.enter_context(mock.patch.object(F, "softmax", at_least_float32(F.softmax)))
        yield


# Cases


@dataclass(frozen=True, eq=False)
class Case:
    """A model with inputs, and a loss whose normalizer is the number of samples.

    Attributes:
        architecture: what the table calls it.
        classes: the loss is a cross-entropy rather than a squared error.
        batch_axis: where the inputs and outputs have the samples.
        options: for the analysis.
        refusals: "monitor" or "report" -> what the error says, as a regular expression, where refusing is right.
        dtypes: in which the model can run.
        reference: turns the float64 copy into one that can run in the loop.
    """

    name: str
    architecture: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    classes: bool = False
    training: bool = False
    batch_axis: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    refusals: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    reference: Callable[[nn.Module], object] = lambda model: None

    def setting(self, dtype: torch.dtype = torch.float64) -> Setting:
        """The same model, inputs and targets at every call, whatever the random state."""
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what building a model says of itself
            seed(zlib.crc32(self.name.encode()))
            model = perturbed(self.model()).to(dtype).train(self.training)
            inputs = mapped(self.inputs(), lambda x: x.to(dtype) if x.is_floating_point() else x)
            with torch.no_grad():
                outputs = main_output(call(model, inputs))
            if self.classes:
                targets = torch.randint(outputs.shape[-1], outputs.shape[:-1])
            else:
                targets = torch.randn(outputs.shape).to(dtype)
            loss = of_classes if self.classes else partial(of_numbers, batch_axis=self.batch_axis)
            return Setting(model, inputs, targets, loss, self.batch_axis, self.reference)

    def __str__(self) -> str:
        return self.name


@dataclass
class Setting:
    model: nn.Module
    inputs: Inputs
    targets: Tensor
    loss_fn: Loss
    batch_axis: int
    reference: Callable[[nn.Module], object]

    def loss(self) -> Tensor:
        return self.loss_fn(call(self.model, self.inputs), self.targets)

    @property
    def n(self) -> int:
        return self.targets.shape[self.batch_axis]

    def squared_norms(self, parameters: str = "trainable") -> dict[str, Tensor]:
        """t_{n,p}, [n], from plain autograd on one sample after the other, in float64."""
        twin, named = double_copy(self.model, parameters)
        self.reference(twin)
        rows: dict[str, list[Tensor]] = {name: [] for name in named}
        for n in range(self.n):
            inputs = mapped(self.inputs, partial(one, n=n, axis=self.batch_axis))
            with at_full_width(torch.float64):
                loss = self.loss_fn(call(twin, inputs), one(self.targets, n, self.batch_axis))
            for name, g in zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True):
                rows[name].append(torch.zeros(()).double() if g is None else g.to_dense().square().sum())
        return {name: torch.stack(row) for name, row in rows.items()}


def one(x: Tensor, n: int, axis: int) -> Tensor:
    """Sample n as a batch of one, in float64 if it is a real number."""
    x = x.narrow(axis, n, 1)
    return x.double() if x.is_floating_point() else x


def perturbed(model: nn.Module) -> nn.Module:
    """`model` with no parameter or running statistic left at a value that hides mistakes, such as 0 or 1."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


# transformers and peft

WORDS = 23


def words(n: int, t: int) -> Tensor:
    return torch.randint(WORDS, (n, t))


def language(n: int = 4, t: int = 6) -> Callable[[], Inputs]:
    return lambda: {"input_ids": words(n, t)}


def hugging(name: str, *, experts: str | None = None, **options: Any) -> Callable[[], nn.Module]:
    """The transformers model of that class, with a configuration of its own kind."""

    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, name)
        config = kind.config_class(**options)
        if experts is not None:
            config._experts_implementation = experts
        return kind(config)

    return build


GPT2 = {"vocab_size": WORDS, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
T5 = {
    "vocab_size": WORDS,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
}
WHISPER = {
    "vocab_size": WORDS,
    "d_model": 16,
    "num_mel_bins": 5,
    "max_source_positions": 8,
    "max_target_positions": 12,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
WAV2VEC2 = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 3}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 4,
    "num_labels": 3,
}


def lora(base: Callable[[], nn.Module], **options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(base(), LoraConfig(r=2, **options))


def transformers_cases() -> list[Case]:
    text = partial(Case, classes=True)
    image = lambda *shape: lambda: {"pixel_values": torch.randn(*shape)}  # noqa: E731
    gpt2 = hugging("GPT2LMHeadModel", **GPT2, **NO_DROPOUT)
    masked = lambda: {  # noqa: E731
        "input_ids": words(4, 6),
        "attention_mask": (torch.arange(6) < torch.tensor([6, 4, 3, 5])[:, None]).long(),
        "token_type_ids": torch.randint(2, (4, 6)),
    }
    pair = lambda: {"input_ids": words(3, 5), "decoder_input_ids": words(3, 4)}  # noqa: E731
    speech = lambda: {"input_features": torch.randn(3, 5, 16), "decoder_input_ids": words(3, 4)}  # noqa: E731
    return [
        text("gpt2", "GPT-2", gpt2, language()),
        text("gpt2-square", "GPT-2, as many samples as tokens", gpt2, language(5, 5)),
        text("gpt2-training", "GPT-2 in training mode", gpt2, language(), training=True),
        text(
            "gpt2-positions",
            "GPT-2 with position ids",
            gpt2,
            lambda: {"input_ids": words(4, 6), "position_ids": torch.arange(6).repeat(4, 1)},
        ),
        text("gpt2-one_sample", "GPT-2, one sample", gpt2, language(1, 6)),
        text("llama", "Llama, grouped-query attention", hugging("LlamaForCausalLM", **LLAMA), language()),
        text("llama-square", "Llama, square", hugging("LlamaForCausalLM", **LLAMA), language(5, 5)),
        text(
            "llama-eager",
            "Llama, eager attention",
            hugging("LlamaForCausalLM", **LLAMA, attn_implementation="eager"),
            language(),
        ),
        *(
            text(
                f"mixtral-{way}",
                f"Mixtral, {way} experts",
                hugging(
                    "MixtralForCausalLM",
                    **LLAMA,
                    num_local_experts=4,
                    num_experts_per_tok=2,
                    experts=way,
                ),
                language(),
            )
            for way in ("eager", "batched_mm")
        ),
        text(
            "mixtral",
            "Mixtral, grouped_mm experts (the default)",
            hugging("MixtralForCausalLM", **LLAMA, num_local_experts=4, num_experts_per_tok=2),
            language(),
            dtypes=(torch.float32,),  # the kernel knows no other
            reference=lambda model: setattr(model.config, "_experts_implementation", "eager"),
        ),
        text(
            "mamba",
            "Mamba",
            hugging(
                "MambaForCausalLM",
                vocab_size=WORDS,
                hidden_size=16,
                state_size=4,
                num_hidden_layers=2,
                conv_kernel=3,
                time_step_rank=2,
                residual_in_fp32=False,
            ),
            language(),
        ),
        text(
            "mamba2",
            "Mamba-2",
            hugging(
                "Mamba2ForCausalLM",
                vocab_size=WORDS,
                hidden_size=16,
                state_size=4,
                num_hidden_layers=2,
                conv_kernel=3,
                expand=2,
                num_heads=4,
                head_dim=8,
                n_groups=2,
                chunk_size=4,
                residual_in_fp32=False,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            ),
            language(),
        ),
        text("t5", "T5", hugging("T5ForConditionalGeneration", **T5), pair),
        text(
            "t5-square",
            "T5, square",
            hugging("T5ForConditionalGeneration", **T5),
            lambda: {"input_ids": words(5, 5), "decoder_input_ids": words(5, 5)},
        ),
        text("bert", "BERT classifier", hugging("BertForSequenceClassification", **BERT), masked),
        text(
            "bert-square", "BERT classifier, square", hugging("BertForSequenceClassification", **BERT), language(5, 5)
        ),
        text("bert-masked", "BERT masked language model", hugging("BertForMaskedLM", **BERT), masked),
        text(
            "distilbert",
            "DistilBERT",
            hugging(
                "DistilBertForSequenceClassification",
                vocab_size=WORDS,
                dim=16,
                n_layers=2,
                n_heads=2,
                hidden_dim=24,
                max_position_embeddings=16,
                num_labels=3,
            ),
            language(),
        ),
        text("vit", "ViT", hugging("ViTForImageClassification", **VIT), image(4, 3, 8, 8)),
        text("vit-square", "ViT, square", hugging("ViTForImageClassification", **VIT), image(5, 3, 8, 8)),
        text("whisper", "Whisper", hugging("WhisperForConditionalGeneration", **WHISPER), speech),
        Case(
            "wav2vec2",
            "Wav2Vec2, group norm",
            hugging("Wav2Vec2Model", **WAV2VEC2),
            lambda: {"input_values": torch.randn(3, 60)},
        ),
        text(
            "wav2vec2-ctc",
            "Wav2Vec2 with a CTC head, layer norm",
            hugging("Wav2Vec2ForCTC", **WAV2VEC2, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True),
            lambda: {"input_values": torch.randn(3, 60)},
        ),
        text(
            "resnet",
            "ResNet, bottleneck",
            hugging("ResNetForImageClassification", **RESNET, layer_type="bottleneck"),
            image(4, 3, 16, 16),
        ),
        text(
            "resnet-basic",
            "ResNet, basic",
            hugging("ResNetForImageClassification", **RESNET, layer_type="basic"),
            image(4, 3, 16, 16),
        ),
        text(
            "convnext",
            "ConvNeXt",
            hugging("ConvNextForImageClassification", num_stages=2, hidden_sizes=[8, 16], depths=[1, 2], num_labels=3),
            image(4, 3, 16, 16),
        ),
        text("swin", "Swin", hugging("SwinForImageClassification", **SWIN), image(3, 3, 16, 16)),
        text(
            "lora-gpt2",
            "LoRA on a frozen GPT-2",
            partial(lora, gpt2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
            language(),
        ),
        text(
            "lora-llama",
            "LoRA on a frozen Llama",
            partial(lora, hugging("LlamaForCausalLM", **LLAMA), target_modules=["q_proj", "v_proj"]),
            language(),
        ),
        text(
            "lora-llama-all",
            "LoRA on Llama, frozen parameters too",
            partial(lora, hugging("LlamaForCausalLM", **LLAMA), target_modules=["q_proj", "v_proj"]),
            language(),
            options={"parameters": "all"},
        ),
        text(
            "dora-llama",
            "DoRA on a frozen Llama",
            partial(lora, hugging("LlamaForCausalLM", **LLAMA), target_modules=["q_proj", "v_proj"], use_dora=True),
            language(),
        ),
    ]


# torch's own attention and recurrence


class UNet(nn.Module):
    """Down and up again, with a skip connection at each size."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.bottom = self.block(2, 4), self.block(4, 6), self.block(6, 6)
        self.up_two, self.up_one = nn.ConvTranspose2d(6, 6, 2, 2), nn.ConvTranspose2d(6, 4, 2, 2)
        self.after_two, self.after_one = self.block(12, 6), self.block(8, 4)
        self.head = nn.Conv2d(4, 3, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.GroupNorm(2, outputs),
            nn.SiLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        up = self.up_two(self.bottom(F.max_pool2d(two, 2)))
        up = self.up_one(self.after_two(torch.cat([up, two], 1)))
        return self.head(self.after_one(torch.cat([up, one], 1)))


def encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, **options)


def attention_cases() -> list[Case]:
    transformer = partial(nn.Transformer, 8, 2, 2, 2, 12, dropout=0.0)
    transposed = lambda m, *xs: m.body(*(x.transpose(0, 1) for x in xs)).transpose(0, 1)  # noqa: E731
    pair = lambda *shapes: lambda: tuple(torch.randn(shape) for shape in shapes)  # noqa: E731
    cases = [
        Case(
            "transformer-batch_first",
            "nn.Transformer, batch_first=True",
            partial(transformer, batch_first=True),
            pair((3, 5, 8), (3, 4, 8)),
        ),
        Case(
            "transformer-sequence_first",
            "nn.Transformer, batch_first=False",
            transformer,
            pair((5, 3, 8), (4, 3, 8)),
            batch_axis=1,
            options={"batch_axis": 1},
        ),
        Case(
            "transformer-sequence_first-square",
            "nn.Transformer, batch_first=False, square",
            transformer,
            pair((4, 4, 8), (4, 4, 8)),
            batch_axis=1,
            options={"batch_axis": 1},
        ),
        Case(
            "transformer-wrapped",
            "nn.Transformer, batch_first=False, in a batch-first model",
            lambda: Forward(transposed, body=transformer()),
            pair((3, 5, 8), (3, 4, 8)),
        ),
        Case(
            "transformer-wrapped-square",
            "nn.Transformer, batch_first=False, in a batch-first model, square",
            lambda: Forward(transposed, body=transformer()),
            pair((4, 4, 8), (4, 4, 8)),
        ),
    ]
    for training in (False, True):
        cases.append(
            Case(
                f"encoder-{'training' if training else 'eval'}",
                f"nn.TransformerEncoder, {'training' if training else 'eval'} mode",
                lambda: nn.TransformerEncoder(encoder_layer(batch_first=True), 2),
                pair((3, 5, 8)),
                training=training,
            )
        )
        cases.append(
            Case(
                f"encoder-padded-{'training' if training else 'eval'}",
                f"nn.TransformerEncoder with a padding mask, {'training' if training else 'eval'} mode",
                lambda: Forward(
                    lambda m, x, mask: m.body(x, src_key_padding_mask=mask).masked_fill(mask[..., None], 0.0),
                    body=nn.TransformerEncoder(encoder_layer(batch_first=True, norm_first=True), 2),
                ),
                lambda: (torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([5, 4, 3])[:, None]),
                training=training,
            )
        )
    cases.append(
        Case(
            "decoder",
            "nn.TransformerDecoder with a causal mask",
            lambda: Forward(
                lambda m, x, y: m.body(x, y, tgt_mask=nn.Transformer.generate_square_subsequent_mask(4, dtype=x.dtype)),
                body=nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2),
            ),
            pair((3, 4, 8), (3, 5, 8)),
        )
    )
    kinds: dict[str, dict[str, Any]] = {
        "packed": {},
        "separate": {"kdim": 6, "vdim": 5},
        "no_bias": {"bias": False},
        "bias_kv": {"add_bias_kv": True, "add_zero_attn": True},
    }
    for kind, options in kinds.items():
        for batch_first in (True, False):
            for need_weights in (True, False):
                shapes = [(3, 4, 8), (3, 5, options.get("kdim", 8)), (3, 5, options.get("vdim", 8))]
                shapes = shapes if batch_first else [(s[1], s[0], s[2]) for s in shapes]
                axis = 0 if batch_first else 1
                suffix = f"{kind}-{'batch' if batch_first else 'sequence'}_first" + "-weights" * need_weights
                cases.append(
                    Case(
                        f"attention-{suffix}",
                        f"nn.MultiheadAttention, {suffix}",
                        partial(attention_model, options, batch_first, need_weights),
                        pair(*shapes),
                        batch_axis=axis,
                        options={"batch_axis": 1} if axis else {},
                    )
                )
    return cases


def attention_model(options: dict[str, Any], batch_first: bool, need_weights: bool) -> nn.Module:
    def forward(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, weights = m.attention(m.first(q), key=k, value=v, need_weights=need_weights)
        return out if weights is None else (out, weights.square().sum((-1, -2)))

    return Forward(
        forward,
        first=nn.Linear(8, 8),
        attention=nn.MultiheadAttention(8, 2, batch_first=batch_first, **options),
    )


def packed_forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    """Through a PackedSequence and back."""
    packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return rnn.pad_packed_sequence(m.body(packed)[0], batch_first=True, total_length=x.shape[1])[0]


def recurrent_cases() -> list[Case]:
    cases = []
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "layers": {"num_layers": 2},
        "bidirectional": {"num_layers": 2, "bidirectional": True},
        "no_bias": {"bias": False},
    }
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        extra = (
            {"proj_size": {"num_layers": 2, "proj_size": 2}} if kind is nn.LSTM else {"relu": {"nonlinearity": "relu"}}
        )
        for name, options in {**settings, **(extra if kind is not nn.GRU else {})}.items():
            title, lower = f"nn.{kind.__name__}, {name}", kind.__name__.lower()
            body = partial(kind, 4, 3, batch_first=True, **options)
            cases.append(Case(f"{lower}-{name}", title, body, lambda: torch.randn(3, 5, 4)))
            cases.append(
                Case(
                    f"{lower}-{name}-packed",
                    f"{title}, PackedSequence",
                    lambda body=body: Forward(packed_forward, body=body()),
                    lambda: (torch.randn(3, 5, 4), torch.tensor([3, 5, 2])),
                )
            )
            sequence_first = partial(kind, 4, 3, **options)
            cases.append(
                Case(
                    f"{lower}-{name}-sequence_first",
                    f"{title}, batch_first=False",
                    sequence_first,
                    lambda: torch.randn(5, 3, 4),
                    batch_axis=1,
                    options={"batch_axis": 1},
                )
            )
            cases.append(
                Case(
                    f"{lower}-{name}-wrapped-square",
                    f"{title}, batch_first=False, in a batch-first model, square",
                    lambda body=sequence_first: Forward(
                        lambda m, x: m.body(x.transpose(0, 1))[0].transpose(0, 1), body=body()
                    ),
                    lambda: torch.randn(4, 4, 4),
                )
            )
    for kind in (nn.LSTMCell, nn.GRUCell):
        cases.append(
            Case(
                kind.__name__.lower(),
                f"nn.{kind.__name__} in a loop",
                lambda kind=kind: Forward(unrolled, cell=kind(4, 3)),
                lambda: torch.randn(3, 4, 4),
            )
        )
    return cases


def unrolled(m: Any, x: Tensor) -> Tensor:
    state, seen = None, []
    for step in x.unbind(1):
        state = m.cell(step, state)
        seen.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(seen, 1)


# Embeddings of bags, computed weights, outputs of every kind


def ragged(m: Any, ids: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
    """Bags of several lengths, given as one row of ids with offsets."""
    keep = torch.arange(ids.shape[1]) < lengths[:, None]
    offsets = lengths.cumsum(0) - lengths
    own = weights[keep] if m.body.mode == "sum" else None
    return m.head(m.body(ids[keep], offsets, per_sample_weights=own))


def bag_cases() -> list[Case]:
    cases = []
    bags = lambda: (torch.randint(5, (4, 6)), torch.tensor([6, 2, 1, 4]), torch.randn(4, 6))  # noqa: E731
    for mode in ("sum", "mean", "max"):
        body = partial(nn.EmbeddingBag, 5, 4, mode=mode)
        cases += [
            Case(f"bag-{mode}", f"nn.EmbeddingBag, {mode}", body, lambda: torch.randint(5, (4, 6))),
            Case(
                f"bag-{mode}-padding",
                f"nn.EmbeddingBag, {mode}, padding_idx",
                partial(body, padding_idx=1),
                lambda: torch.randint(5, (4, 6)),
            ),
            Case(
                f"bag-{mode}-offsets",
                f"nn.EmbeddingBag, {mode}, offsets" + ", per_sample_weights" * (mode == "sum"),
                lambda body=body: Forward(ragged, body=body(), head=nn.Linear(4, 3)),
                bags,
            ),
        ]
    cases.append(
        Case(
            "bag-weights",
            "nn.EmbeddingBag, sum, per_sample_weights",
            lambda: Forward(
                lambda m, ids, x: m.body(ids, per_sample_weights=m.weights(x)),
                body=nn.EmbeddingBag(5, 4, mode="sum"),
                weights=nn.Linear(3, 6),
            ),
            lambda: (torch.randint(5, (4, 6)), torch.randn(4, 3)),
        )
    )
    return cases


class Symmetric(nn.Module):
    """A user's own parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


def net(first: nn.Module, width: int = 4) -> nn.Module:
    return nn.Sequential(first, nn.Tanh(), nn.Linear(width, 3))


def convolutional(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.Tanh(), nn.Conv1d(4, 2, 1))


def own_parametrization() -> nn.Module:
    model = net(nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    return model


def stacked_parametrizations() -> nn.Module:
    model = net(parametrizations.weight_norm(nn.Linear(4, 4)))
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    return model


def pruned(structured: bool) -> nn.Module:
    model = net(nn.Linear(4, 4))
    if structured:
        prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    else:
        prune.random_unstructured(model[0], "weight", 0.5)
        prune.random_unstructured(model[0], "bias", 0.5)
    return model


def computed_cases() -> list[Case]:
    rows, signals = (lambda: torch.randn(5, 4)), (lambda: torch.randn(4, 4, 6))
    conv = partial(nn.Conv1d, 4, 4, 3)
    spectral, legacy = parametrizations.spectral_norm, torch.nn.utils
    return [
        Case("weight_norm", "weight_norm on Linear", lambda: net(parametrizations.weight_norm(nn.Linear(4, 4))), rows),
        Case(
            "weight_norm-conv",
            "weight_norm on Conv1d",
            lambda: convolutional(parametrizations.weight_norm(conv())),
            signals,
        ),
        Case(
            "weight_norm-groups",
            "weight_norm on grouped Conv1d, dim=2",
            lambda: convolutional(parametrizations.weight_norm(conv(groups=2), dim=2)),
            signals,
        ),
        Case("weight_norm-legacy", "weight_norm, legacy", lambda: net(legacy.weight_norm(nn.Linear(4, 4))), rows),
        Case(
            "weight_norm-legacy-conv",
            "weight_norm, legacy, Conv1d",
            lambda: convolutional(legacy.weight_norm(conv())),
            signals,
        ),
        Case("spectral_norm", "spectral_norm in eval mode", lambda: net(spectral(nn.Linear(4, 4))), rows),
        Case(
            "spectral_norm-conv",
            "spectral_norm on Conv1d in eval mode",
            lambda: convolutional(spectral(conv())),
            signals,
        ),
        Case(
            "spectral_norm-legacy",
            "spectral_norm, legacy, in eval mode",
            lambda: net(legacy.spectral_norm(nn.Linear(4, 4))),
            rows,
        ),
        Case(
            "orthogonal", "orthogonal parametrization", lambda: net(parametrizations.orthogonal(nn.Linear(4, 4))), rows
        ),
        Case("parametrization", "a user's own parametrization", own_parametrization, rows),
        Case("parametrizations", "two parametrizations of one weight", stacked_parametrizations, rows),
        Case("pruned", "torch.nn.utils.prune, unstructured", partial(pruned, False), rows),
        Case("pruned-structured", "torch.nn.utils.prune, structured", partial(pruned, True), rows),
    ]


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor
    note: str = "a dataclass"


class Inner(nn.Module):
    """Returns whatever is asked for, and takes keywords only."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.layer, self.scale = kind, nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, *, values: Tensor, factor: float = 1.0) -> Any:
        hidden = self.layer(values) * factor
        logits = hidden.tanh() * self.scale
        kinds: dict[str, Callable[[], Any]] = {
            "tuple": lambda: (logits, hidden),
            "list": lambda: [logits, {"hidden": hidden}],
            "dict": lambda: {"logits": logits, "hidden": hidden},
            "dataclass": lambda: Answer(logits, hidden),
        }
        return kinds[self.kind]()


class Outer(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.one, self.two = Inner(kind), Inner(kind)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.two(values=main_output(self.one(values=x if y is None else x + y, factor=0.5)))


def output_cases() -> list[Case]:
    kinds = ("tuple", "list", "dict", "dataclass")
    cases = [
        Case(
            f"returns-{kind}",
            f"modules that take keywords and return a {kind}",
            partial(Outer, kind),
            lambda: torch.randn(5, 3, 4),
        )
        for kind in kinds
    ]
    cases.append(
        Case(
            "by_keyword",
            "a model called by keyword",
            partial(Outer, "dict"),
            lambda: {"y": torch.randn(5, 3, 4), "x": torch.randn(5, 3, 4)},
        )
    )
    return cases


CASES: list[Case] = [
    *transformers_cases(),
    Case("unet", "UNet with skip connections", UNet, lambda: torch.randn(3, 2, 8, 8)),
    *attention_cases(),
    *recurrent_cases(),
    *bag_cases(),
    *computed_cases(),
    *output_cases(),
]
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES), "two cases of one name"


# How a case is judged


@dataclass
class Outcome:
    """What one way of analyzing a case said, against the loop."""

    errors: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    refusal: str = ""

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)


@cache
def reference(case: Case, dtype: torch.dtype) -> tuple[Setting, dict[str, Tensor]]:
    """A case's setting, which every way leaves as it found it but for `.grad`, and its traces by a loop over samples.

    The loop runs a copy in float64, whose numbers are the same ones in each dtype: all are drawn in float32.
    """
    if dtype != case.dtypes[0]:
        return case.setting(dtype), reference(case, case.dtypes[0])[1]
    setting = case.setting(dtype)
    return setting, trace(setting.squared_norms(case.options.get("parameters", "trainable")))


def outcome(case: Case, way: str, dtype: torch.dtype) -> Outcome:
    """The traces of a monitor around a step, or of `fisher_report`, against a loop over samples."""
    setting, expected = reference(case, dtype)
    try:
        with at_full_width(dtype):
            report = ways[way](setting, case.options)
    except CurvatureError as error:
        return Outcome(refusal=str(error))
    assert list(report.index) == list(expected)
    total = torch.stack(list(expected.values())).sum()
    found = Outcome(rules=sorted({rule for rules in report["rule"] for rule in rules.split(" + ")}))
    for name, value in expected.items():
        mine = torch.tensor(report.loc[name, "fisher_trace"])
        if float(value) > 1e-12 * float(total):
            found.errors[name] = float(relative_error(mine, value))
        try:
            assert_equal(mine, value, total, dtype)
        except AssertionError:
            found.wrong.append(f"{name}: {float(mine):.9g}, not {float(value):.9g}")
    return found


def monitored(setting: Setting, options: Mapping[str, Any]) -> pd.DataFrame:
    with FisherMonitor(setting.model, **options) as monitor:
        setting.loss().backward()
    return monitor.report()


def reported(setting: Setting, options: Mapping[str, Any]) -> pd.DataFrame:
    data = (setting.inputs, setting.targets)
    return fisher_report(setting.model, setting.loss_fn, data, progress=False, verify=True, **options)


ways = {"monitor": monitored, "report": reported}
