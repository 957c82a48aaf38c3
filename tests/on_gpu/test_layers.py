"""Layers that have kernels and nodes of their own on GPUs, against a loop over samples in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from expectations import expectation
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report
from torch_secorder.testing import sample_gradients

N, T, D = 6, 16, 32
HALF = (torch.bfloat16, torch.float16)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).sum(1).mean()


class Head(nn.Module):
    """A body between two linear layers; of what it returns the first is taken."""

    def __init__(self, body: nn.Module, width: int = D, out: int = D, transposed: bool = False) -> None:
        super().__init__()
        self.first, self.body, self.last, self.transposed = nn.Linear(D, width), body, nn.Linear(out, 4), transposed

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.body(x.transpose(1, 2) if self.transposed else x)
        x = x[0] if isinstance(x, tuple) else x
        return self.last(x.transpose(1, 2) if self.transposed else x).mean(1)


class Attention(nn.Module):
    """Scaled dot products by the one kernel that is named."""

    def __init__(self, backend: SDPBackend, causal: bool = False, masked: bool = False, groups: int = 1) -> None:
        super().__init__()
        self.heads, self.groups = 2 * groups, groups
        self.q, self.kv = nn.Linear(D, self.heads * D), nn.Linear(D, 2 * 2 * D)
        self.o = nn.Linear(self.heads * D, D)
        self.backend, self.causal, self.masked = backend, causal, masked

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, D)).transpose(1, 2)
        k, v = (y.unflatten(-1, (2, D)).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril() if self.masked else None
        with sdpa_kernel(self.backend if x.is_cuda else SDPBackend.MATH):
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=self.causal, enable_gqa=self.groups > 1
            )
        return self.o(y.transpose(1, 2).flatten(2))


class Cells(nn.Module):
    """A cell for each step, by hand."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state, found = None, []
        for one in x.unbind(1):
            state = self.cell(one, state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(found, 1)


class Images(nn.Module):
    """(N, T, D) as images of 4 channels."""

    def __init__(self, body: nn.Module, channels_last: bool = False) -> None:
        super().__init__()
        self.body, self.format = body, torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), 4, T // 2, D // 2).contiguous(memory_format=self.format)
        return self.body(x).flatten(2).mean(2).unsqueeze(1)


class Volumes(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.reshape(len(x), 2, 4, 8, 8)).flatten(2).mean(2).unsqueeze(1)


class Sampled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        grid = x[:, 0, :8, :2].tanh().unsqueeze(1).expand(-1, 8, -1, -1)
        y = F.grid_sample(x, grid, align_corners=False)
        return F.interpolate(y, (T, D), mode="bilinear").squeeze(1)


class Functional(nn.Module):
    def __init__(self, function: Callable[..., Tensor], *parameters: nn.Parameter, **modules: nn.Module) -> None:
        super().__init__()
        self.function, self.parameters_of = function, nn.ParameterList(parameters)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parameters_of)


class Experts(nn.Module):
    """Four experts, each of which takes a quarter of every sample's positions, by grouped products."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, D, D) / D**0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.transpose(0, 1).flatten(0, 1)
        ends = (torch.arange(1, 5, device=x.device) * (len(flat) // 4)).int()
        if x.is_cuda and x.dtype == torch.bfloat16:
            y = F.grouped_mm(flat, self.weight, offs=ends)
        else:
            y = torch.cat([part @ w for part, w in zip(flat.chunk(4), self.weight, strict=True)])
        return y.unflatten(0, (T, len(x))).transpose(0, 1)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@dataclass(frozen=True)
class Case:
    """A model, and what is expected.

    Attributes:
        refusal: what monitors say, if they refuse.
        of_functions: what reports and functions say, if they do.
        eval: whether it runs in eval mode.
    """

    build: Callable[[], nn.Module]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    refusal: str = ""
    of_functions: str = ""
    eval: bool = False


STATISTICS = "statistics of the whole batch"
BOTH = (torch.float32, *HALF)
FLASH, EFFICIENT, CUDNN, MATH = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)


def rnn(kind: type[nn.RNNBase], out: int = D, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Head(kind(D, D, batch_first=True, **options), out=out)


def normed(body: Callable[[], nn.Module], transposed: bool = False) -> Callable[[], nn.Module]:
    return lambda: Head(body(), transposed=transposed)


def used(norm: nn.Module) -> nn.Module:
    """With running statistics that are not those it begins with."""
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def images(body: Callable[[], nn.Module], out: int = 8, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Head(Images(body(), **options), out=out)


CASES = {
    "lstm": Case(rnn(nn.LSTM)),
    "lstm-half": Case(rnn(nn.LSTM), HALF),
    "lstm-two_layers_both_ways": Case(rnn(nn.LSTM, 2 * D, num_layers=2, bidirectional=True)),
    "lstm-projected": Case(rnn(nn.LSTM, 8, proj_size=8)),
    "lstm-without_bias": Case(rnn(nn.LSTM, bias=False)),
    "gru": Case(rnn(nn.GRU)),
    "gru-two_layers_both_ways": Case(rnn(nn.GRU, 2 * D, num_layers=2, bidirectional=True)),
    "rnn-tanh": Case(rnn(nn.RNN)),
    "rnn-relu": Case(rnn(nn.RNN, nonlinearity="relu")),
    "lstm-cell": Case(lambda: Head(Cells(nn.LSTMCell(D, D)))),
    "gru-cell": Case(lambda: Head(Cells(nn.GRUCell(D, D)))),
    "rnn-cell": Case(lambda: Head(Cells(nn.RNNCell(D, D)))),
    "attention-flash": Case(lambda: Head(Attention(FLASH)), HALF),
    "attention-flash_causal": Case(lambda: Head(Attention(FLASH, causal=True)), HALF),
    "attention-flash_grouped": Case(lambda: Head(Attention(FLASH, groups=2)), HALF),
    "attention-efficient": Case(lambda: Head(Attention(EFFICIENT)), BOTH),
    "attention-efficient_causal": Case(lambda: Head(Attention(EFFICIENT, causal=True)), BOTH),
    "attention-efficient_masked": Case(lambda: Head(Attention(EFFICIENT, masked=True)), BOTH),
    "attention-cudnn": Case(lambda: Head(Attention(CUDNN)), HALF),
    "attention-cudnn_causal": Case(lambda: Head(Attention(CUDNN, causal=True)), HALF),
    "attention-math": Case(lambda: Head(Attention(MATH)), BOTH),
    "multihead": Case(lambda: Head(SelfAttention()), BOTH),
    "encoder": Case(lambda: Head(nn.TransformerEncoderLayer(D, 4, 64, dropout=0.0, batch_first=True)), BOTH),
    "encoder-eval": Case(
        lambda: Head(nn.TransformerEncoderLayer(D, 4, 64, dropout=0.0, batch_first=True)), BOTH, eval=True
    ),
    "batchnorm-eval": Case(normed(lambda: used(nn.BatchNorm1d(D)), True), BOTH, eval=True),
    "batchnorm-train": Case(normed(lambda: nn.BatchNorm1d(D), True), BOTH, refusal=STATISTICS, of_functions=STATISTICS),
    "batchnorm2d-eval": Case(images(lambda: used(nn.BatchNorm2d(4)), 4), BOTH, eval=True),
    "layernorm": Case(normed(lambda: nn.LayerNorm(D)), BOTH),
    "rmsnorm": Case(normed(lambda: nn.RMSNorm(D)), BOTH),
    "groupnorm": Case(normed(lambda: nn.GroupNorm(4, D), True), BOTH),
    "instancenorm": Case(normed(lambda: nn.InstanceNorm1d(D, affine=True), True)),
    "conv1d": Case(normed(lambda: nn.Conv1d(D, D, 3, padding=1), True), BOTH),
    "conv1d-grouped": Case(normed(lambda: nn.Conv1d(D, D, 5, padding=2, groups=4), True), BOTH),
    "conv1d-depthwise": Case(normed(lambda: nn.Conv1d(D, D, 3, padding=1, groups=D), True), BOTH),
    "conv2d": Case(images(lambda: nn.Conv2d(4, 8, 3, padding=1)), BOTH),
    "conv2d-channels_last": Case(images(lambda: nn.Conv2d(4, 8, 3, padding=1), channels_last=True), BOTH),
    "conv2d-stride_dilation": Case(images(lambda: nn.Conv2d(4, 8, 3, 2, 2, dilation=2)), BOTH),
    "conv2d-circular": Case(images(lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular")), BOTH),
    "conv2d-depthwise": Case(images(lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4)), BOTH),
    "conv2d-transposed": Case(images(lambda: nn.ConvTranspose2d(4, 8, 3, 2, 1, 1)), BOTH),
    "conv3d": Case(lambda: Head(Volumes(nn.Conv3d(2, 8, 3, padding=1)), out=8), BOTH),
    "grid_sample": Case(lambda: Head(Sampled())),
    "scale": Case(
        lambda: Head(
            Functional(lambda x, w, b: F.gelu(x * w + b), nn.Parameter(torch.randn(D)), nn.Parameter(torch.zeros(D)))
        ),
        BOTH,
    ),
    "einsum": Case(
        lambda: Head(
            Functional(lambda x, w: torch.einsum("ntd,hde->nthe", x, w).mean(2), nn.Parameter(torch.randn(3, D, D) / 6))
        ),
        BOTH,
    ),
    "positions": Case(lambda: Head(Functional(lambda x, p: x + p, nn.Parameter(torch.randn(1, T, D)))), BOTH),
    "prelu": Case(normed(lambda: nn.PReLU(D), True), BOTH),
    "experts": Case(lambda: Head(Experts()), (torch.float32, torch.bfloat16)),
}


# In half precision gradients are of half precision, and each sample's differs a little from that of the sample alone.
TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def monitor(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    with FisherMonitor(model) as watching:
        for _ in range(4):  # the fourth is not checked
            loss(model(x), y).backward()
    return watching.report()["fisher_trace"].to_dict()


def report(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    return fisher_report(model, loss, (x, y), progress=False)["fisher_trace"].to_dict()


def function(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    return {"": float(empirical_fisher_trace(model, loss, x, y))}


WAYS = {"monitor": monitor, "report": report, "function": function}
ALL = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype)[6:]}") for name, case in CASES.items() for dtype in case.dtypes
]


@pytest.mark.filterwarnings(
    "ignore:RNN module weights are not part of single"
)  # torch joins those of other dtypes only
@pytest.mark.parametrize(("name", "dtype"), ALL)
@pytest.mark.parametrize("way", WAYS)
def test_layer(name: str, dtype: torch.dtype, way: str) -> None:
    case = CASES[name]
    torch.set_default_device("cpu")
    torch.manual_seed(0)
    model, x, y = (
        case.build().train(not case.eval).to(dtype),
        torch.randn(N, T, D).to(dtype),
        torch.randn(N, 4).to(dtype),
    )
    refusal = case.refusal if way == "monitor" else case.of_functions
    right = {} if refusal else sample_gradients(model, loss, x, y)
    torch.set_default_device("cuda")
    model = model.to("cuda")
    with expectation(refusal):
        found = WAYS[way](model, x.to("cuda"), y.to("cuda"))
        traces = {name: float(g.square().sum()) / N for name, g in right.items()}
        traces |= {"": sum(traces.values())}
        for key, value in found.items():
            assert value == pytest.approx(traces[key], rel=TOLERANCES[dtype], abs=1e-6 * traces[""]), key


class Words(nn.Module):
    def __init__(self, tied: bool, bag: str | None) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(50, D, mode=bag) if bag else nn.Embedding(50, D, padding_idx=0)
        self.body, self.bag = nn.Linear(D, D), bag
        self.last = nn.Linear(D, 50, bias=False)
        if tied:
            self.last.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        y = self.last(F.gelu(self.body(self.table(ids))))
        return y if self.bag else y.mean(1)


@pytest.mark.parametrize("bag", [None, "sum", "mean", "max"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_words(tied: bool, bag: str | None, way: str) -> None:
    torch.set_default_device("cpu")
    model, ids, y = Words(tied, bag), torch.randint(50, (N, T)), torch.randn(N, 50)
    right = sample_gradients(model, loss, ids, y)
    torch.set_default_device("cuda")
    found = WAYS[way](model.to("cuda"), ids.to("cuda"), y.to("cuda"))
    traces = {name: float(g.square().sum()) / N for name, g in right.items()}
    traces |= {"": sum(traces.values())}
    for key, value in found.items():
        assert value == pytest.approx(traces[key], rel=2e-4), key
