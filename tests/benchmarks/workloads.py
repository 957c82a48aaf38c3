"""The models that are measured, and how much each may cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
CLASSES = 10


@dataclass(frozen=True)
class Setting:
    """A model with a batch to run it on; the loss averages over samples."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss_fn: Loss

    def batch(self, n: int | None = None) -> tuple[Tensor, Tensor]:
        """The first n samples."""
        return self.inputs[:n], self.targets[:n]

    def on(self, model: nn.Module) -> Setting:
        """The same with another model."""
        return replace(self, model=model)


@dataclass(frozen=True)
class Goals:
    """The most that time and memory may be, over those of a plain step; None where nothing was promised."""

    monitor_loop: float | None = None
    functional: float | None = None
    monitor_loop_memory: float | None = None
    functional_memory: float | None = None

    def told(self, variant: str, ratio: float | None, memory: bool = False) -> str:
        """Whether a variant's ratio meets its goal; nothing where there is none."""
        goal = getattr(self, f"{variant}_memory" if memory else variant, None)
        if goal is None or ratio is None:
            return ""
        return f"goal {goal:.2f} {'met' if round(ratio, 2) <= goal else 'missed'}"


@dataclass(frozen=True)
class Workload:
    name: str
    label: str
    build: Callable[[], Setting]
    goals: Goals

    def setting(self) -> Setting:
        """The same model and batch at every call, whatever the random state."""
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            return self.build()


def classification(model: nn.Module, inputs: Tensor, classes: int = CLASSES) -> Setting:
    return Setting(model, inputs, torch.randint(classes, (len(inputs),)), nn.CrossEntropyLoss())


def images(model: nn.Module, n: int, side: int) -> Setting:
    return classification(model, torch.randn(n, 3, side, side))


# Layers


def mlp() -> Setting:
    layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, CLASSES)]
    return classification(nn.Sequential(*layers), torch.randn(256, 784))


def wide() -> Setting:
    model = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096))
    return classification(model, torch.randn(64, 4096), 4096)


class Residual(nn.Module):
    """x + body(x), scaled so that variances grow by a constant factor over all of the depth."""

    def __init__(self, body: nn.Module, depth: int):
        super().__init__()
        self.body, self.scale = body, depth**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.body(x)


def deep(depth: int = 200, width: int = 32) -> Setting:
    blocks = [Residual(nn.Sequential(nn.Linear(width, width), nn.Tanh()), depth) for _ in range(depth - 1)]
    return classification(nn.Sequential(*blocks, nn.Linear(width, CLASSES)), torch.randn(32, width))


# Images


def cnn() -> Setting:
    layers: list[nn.Module] = []
    for i, o in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return images(nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, CLASSES)), 128, 32)


class BasicBlock(nn.Module):
    """torchvision's, in-place ReLUs and all."""

    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


def resnet() -> Setting:
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [block for i, o, s in widths for block in (BasicBlock(i, o, s), BasicBlock(o, o, 1))]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES)]
    return images(used(nn.Sequential(*stem, *blocks, *head)), 32, 64)


def mobilenet() -> Setting:
    def convolution(i: int, o: int, k: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False)
        return [convolution, nn.BatchNorm2d(o), nn.ReLU6(inplace=True)]

    layers = convolution(3, 32, 3, 2)
    widths = [(32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
    for i, o, stride in widths:
        layers += [*convolution(i, i, 3, stride, i), *convolution(i, o, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES)]
    return images(used(nn.Sequential(*layers, *head)), 32, 64)


def used(model: nn.Module) -> nn.Module:
    """The model in eval mode, with the running statistics of a batch."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # an average over all batches: of the one that follows
    with torch.no_grad():
        model.train()(torch.randn(32, 3, 64, 64))
    return model.eval()


# Sequences


class Logits(nn.Module):
    """A transformers model, from word ids to logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


class Classifier(Logits):
    """The like of a model that has no cache."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


def of_words(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits (N, T, C), averaged over samples and over the positions of each."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def gpt2(n: int = 8, positions: int = 128, width: int = 256, words: int = 8000, layers: int = 4) -> Setting:
    import transformers

    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        vocab_size=words,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=max(width // 64, 1),
        bos_token_id=0,
        eos_token_id=0,
        **dropout,
    )
    model = Logits(transformers.GPT2LMHeadModel(config)).train()
    return Setting(model, torch.randint(words, (n, positions)), torch.randint(words, (n, positions)), of_words)


def bert() -> Setting:
    import transformers

    config = transformers.BertConfig(
        vocab_size=8000,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    model = Classifier(transformers.BertForSequenceClassification(config)).train()
    return classification(model, torch.randint(8000, (16, 128)))


class Encoder(nn.Module):
    """torch's own encoder between two linear layers, averaged over positions."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.embedding = nn.Linear(width, width)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(1))


def encoder() -> Setting:
    return classification(Encoder(128, 4).train(), torch.randn(16, 64, 128))


class Recurrent(nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def lstm() -> Setting:
    return classification(Recurrent(128, 2), torch.randn(32, 50, 128))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("mlp", "MLP 784-1024-1024-10, batch 256", mlp, Goals(1.03, 0.64, 1.1, 0.9)),
        Workload("wide", "two Linear 4096-4096, batch 64", wide, Goals(1.02, 0.45, 1.05, 0.5)),
        Workload("cnn", "CNN 3-32-64-128 on 32x32, batch 128", cnn, Goals(1.25, 1.05, 1.15, 1.0)),
        Workload("resnet", "ResNet-18 at 64x64, batch 32, eval", resnet, Goals(1.20, 0.85, 1.15, 1.0)),
        Workload("mobilenet", "MobileNet-like at 64x64, batch 32, eval", mobilenet, Goals(1.30, 1.10, 1.15, 1.0)),
        Workload("gpt2", "GPT-2-like, 4 layers, 256 wide, 8,000 words, 8 x 128", gpt2, Goals(1.15, 0.95, 1.10, 1.0)),
        Workload("bert", "BERT-like classifier, 4 layers, 256 wide, 16 x 128", bert, Goals(1.20, 0.92, 1.10, 1.0)),
        Workload("encoder", "TransformerEncoder, 4 layers, 128 wide, 16 x 64", encoder, Goals(1.20, 1.00, 1.10, 1.0)),
        Workload("lstm", "LSTM, 2 layers, 128 wide, 32 x 50", lstm, Goals(1.5, 1.3, 1.3, 1.3)),
        Workload("deep", "residual MLP, 200 layers, 32 wide, batch 32", deep, Goals(1.6)),
    )
}
