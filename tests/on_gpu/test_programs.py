"""Programs on a GPU: they run as without a monitor, bit for bit, and the host waits once in a steady step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_secorder import FisherMonitor, fisher_report
from torch_secorder.errors import UnsupportedError, VerificationError
from torch_secorder.testing import sample_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # torch's own compiler does it
]
Program = Callable[[nn.Module, list[tuple[Tensor, Tensor]]], None]


class Network(nn.Module):
    """A few layers of each kind, the first of which may be computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(4, 16))
        self.more = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.GELU(), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(256, 32), nn.LayerNorm(32), nn.Linear(32, 10))
        self.checkpoints = False

    def forward(self, x: Tensor) -> Tensor:
        maps = checkpoint(self.maps, x, use_reentrant=False) if self.checkpoints else self.maps(x)
        return self.head(self.more(maps))


def model() -> nn.Module:
    return Network()


def batches(n: int = 6, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 3, 8, 8), torch.randint(10, (size,))) for _ in range(n)]


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def simple(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def scaled(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1, foreach=True), torch.amp.GradScaler("cuda")
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


def half(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x, y in data:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def checkpointed(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    model.checkpoints = True
    simple(model, data)


def on_a_stream(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    """torch notes that gradients are accumulated in another stream, the one in which the block began; it waits for the other."""
    optimizer, stream = torch.optim.SGD(model.parameters(), 0.1), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for x, y in data:
        with torch.cuda.stream(stream):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)


def in_hooks(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    """The optimizer takes each gradient as it comes, and frees it."""
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    for x, y in data:
        F.cross_entropy(model(x), y).backward()
    for handle in handles:
        handle.remove()


PROGRAMS = (simple, scaled, half, checkpointed, on_a_stream, in_hooks)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.usefixtures("deterministic")
def test_the_same_training(program: Program) -> None:
    plain, data = model(), batches()
    watched = copy.deepcopy(plain)
    program(plain, data)
    with FisherMonitor(watched, **({"loss_scale": 2.0**16} if program is scaled else {})) as monitor:
        program(watched, data)
    assert float(monitor.trace) > 0
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("program", [simple, checkpointed, on_a_stream, in_hooks])
def test_the_first_step_is_that_of_a_loop(program: Program) -> None:
    watched, data = model(), batches(1)
    torch.set_default_device("cpu")
    right = sample_gradients(copy.deepcopy(watched).cpu(), F.cross_entropy, data[0][0].cpu(), data[0][1].cpu())
    torch.set_default_device("cuda")
    with FisherMonitor(watched) as monitor:
        program(watched, data)
    for name, trace in monitor.report()["fisher_trace"].items():
        assert trace == pytest.approx(float(right[name].square().sum()) / 8, rel=2e-4)


OPTIONS = [{}, {"per_sample": True}, {"diagonal": True}, {"activations": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_steady_step_waits_once(options: dict[str, bool]) -> None:
    watched, (x, y) = model(), batches(1)[0]
    with FisherMonitor(watched, **options):
        for step in range(8):
            if step == 7:
                torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                watched.zero_grad()
                F.cross_entropy(watched(x), y).backward()
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
    assert len(waits) <= 1, waits


def test_compiled() -> None:
    watched, (x, y) = model(), batches(1)[0]
    with FisherMonitor(watched) as plain:
        F.cross_entropy(watched(x), y).backward()
    compiled = torch.compile(watched)
    F.cross_entropy(compiled(x), y).backward()
    with FisherMonitor(compiled) as monitor:
        F.cross_entropy(compiled(x), y).backward()
    assert list(monitor.report()["fisher_trace"]) == pytest.approx(list(plain.report()["fisher_trace"]), rel=1e-4)


def ready_for_a_capture() -> tuple[nn.Module, Tensor, Tensor]:
    """A model with a batch, after the few steps in another stream that torch wants before a capture."""
    watched, (x, y) = model(), batches(1)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            watched.zero_grad()
            F.cross_entropy(watched(x), y).backward()
    torch.cuda.current_stream().wait_stream(stream)
    watched.zero_grad()
    return watched, x, y


def test_a_step_that_is_captured_in_a_graph_is_refused() -> None:
    watched, x, y = ready_for_a_capture()
    refused = pytest.raises(UnsupportedError, match="CUDA graph")
    with refused, FisherMonitor(watched), torch.cuda.graph(torch.cuda.CUDAGraph()):
        F.cross_entropy(watched(x), y).backward()


def test_a_graph_that_was_captured_before_is_replayed_in_the_block() -> None:
    watched, x, y = ready_for_a_capture()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        F.cross_entropy(watched(x), y).backward()
    graph.replay()
    right = [p.grad.clone() for p in watched.parameters()]
    with FisherMonitor(watched) as monitor:
        graph.replay()
        assert all(torch.equal(a, p.grad) for a, p in zip(right, watched.parameters(), strict=True))
        F.cross_entropy(watched(x), y).backward()
    assert monitor.n_samples == len(x)


def test_a_model_on_gpu_and_cpu() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6, device="cpu"), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh().to("cuda"))

    watched, x, y = Two(), torch.randn(5, 4, device="cpu"), torch.randn(5, 3)
    with FisherMonitor(watched) as monitor:
        for _ in range(3):
            (watched(x) - y).square().sum(1).mean().backward()
    with torch.device("cpu"):
        alone = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    alone[0].load_state_dict(watched.first.state_dict())
    alone[2].load_state_dict({k: v.cpu() for k, v in watched.second.state_dict().items()})
    torch.set_default_device("cpu")
    right = sample_gradients(alone, lambda o, t: (o - t).square().sum(1).mean(), x, y.cpu())
    traces = [float(g.square().sum()) / 5 for g in right.values()]
    assert list(monitor.report()["fisher_trace"]) == pytest.approx(traces, rel=1e-4)


def test_memory_goes_with_the_block() -> None:
    watched, (x, y) = model(), batches(1)[0]
    with nullcontext():
        F.cross_entropy(watched(x), y).backward()
    watched.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    with FisherMonitor(watched):
        for _ in range(5):
            watched.zero_grad(set_to_none=True)
            F.cross_entropy(watched(x), y).backward()
    watched.zero_grad(set_to_none=True)
    assert torch.cuda.memory_allocated() - before < 2**20


def test_an_index_of_a_sample_that_is_not_there_is_refused_and_leaves_the_device_in_order() -> None:
    """A device that is asked for an entry that is out of range answers nothing more, in any part of the program."""

    class Neighbours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.layer(x) + x[other].sum(1, keepdim=True).detach()

    watched, x, other = Neighbours(), torch.randn(5, 4), torch.tensor([1, 2, 3, 4, 0])
    with pytest.raises(VerificationError, match="raised IndexError"):
        fisher_report(watched, F.cross_entropy, ((x, other), torch.randint(3, (5,))), progress=False)
    assert float(x.square().sum()) > 0
