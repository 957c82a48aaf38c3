"""Gates on outputs and inputs, for channels and for heads, against loops over samples with real masks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from torch_secorder.errors import ArgumentError, CoverageError, LifecycleError, ShapeError, UnsupportedError
from torch_secorder.pruning import Gates, GroupImportance, prune

HEADS = 3


class Masked(nn.Module):
    """A module whose input or output is multiplied by a mask with one entry for each block of channels."""

    def __init__(self, module: nn.Module, side: str, axis: int, gates: int):
        super().__init__()
        self.module, self.side, self.axis = module, side, axis
        self.mask = nn.Parameter(torch.ones(gates, dtype=torch.float64))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.side == "input":
            return self.module(self.masked(x), *args, **kwargs)
        return self.masked(self.module(x, *args, **kwargs))

    def masked(self, x: Tensor) -> Tensor:
        moved = x.movedim(self.axis, -1)
        mask = self.mask.to(x.dtype).repeat_interleave(moved.shape[-1] // len(self.mask))
        return (moved * mask).movedim(-1, self.axis)


Loss = Callable[[Any, Tensor], Tensor]


def by_masks(
    model: nn.Module,
    name: str,
    side: str,
    axis: int,
    gates: int,
    x: Tensor,
    y: Tensor,
    loss_fn: Loss = cross_entropy,
    batch_axis: int = 0,
) -> Tensor:
    """The mean over samples of a real mask's squared gradient, one sample at a time in float64."""
    twin = copy.deepcopy(model).double()
    owner, _, local = name.rpartition(".")
    wrapper = Masked(twin.get_submodule(name), side, axis, gates)
    setattr(twin.get_submodule(owner), local, wrapper)
    total = torch.zeros(gates, dtype=torch.float64)
    for n in range(x.shape[batch_axis]):
        one = x.narrow(batch_axis, n, 1)
        loss = loss_fn(twin(one.double() if one.is_floating_point() else one), y[n : n + 1])
        total += torch.autograd.grad(loss, wrapper.mask)[0].square()
    return total / x.shape[batch_axis]


class Block(nn.Module):
    """A causal block with the names of Llama's layers."""

    def __init__(self, width: int = 12, hidden: int = 20) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.norm, self.act = nn.LayerNorm(width), nn.GELU()
        self.up_proj, self.down_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down_proj(self.act(self.up_proj(self.norm(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(9, 12), nn.ModuleList([Block(), Block()]), nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean(1)


def tokens(n: int = 6, length: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randint(9, (n, length)), torch.randint(4, (n,))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_heads_and_neurons_of_a_transformer(reduction: str) -> None:
    model, (x, y) = Transformer(), tokens()
    asked = {"*.o_proj": {"side": "input", "groups": HEADS}, "*.down_proj": {"side": "input"}}
    with Gates(model, asked, reduction) as gates:
        for part, labels in zip(x.split(4), y.split(4), strict=True):
            cross_entropy(model(part), labels, reduction=reduction).backward()
    assert list(gates.fisher) == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("o_proj", "down_proj")]
    for name, found in gates.fisher.items():
        count = HEADS if name.endswith("o_proj") else 20
        torch.testing.assert_close(found, by_masks(model, name, "input", -1, count, x, y), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    ("pattern", "options", "gates"),
    [
        ("embed", {}, 12),
        ("blocks.0.norm", {}, 12),
        ("blocks.1.act", {"axis": -1}, 20),
        ("blocks.1.act", {"axis": 1}, 5),  # positions, for those who ask for them
        ("blocks.0.v_proj", {"groups": HEADS}, HEADS),
        ("head", {"side": "input", "groups": 4}, 4),
    ],
)
def test_other_places(pattern: str, options: dict[str, Any], gates: int) -> None:
    model, (x, y) = Transformer(), tokens()
    with Gates(model, {pattern: options}) as found:
        cross_entropy(model(x), y).backward()
    expected = by_masks(model, pattern, options.get("side", "output"), options.get("axis", -1), gates, x, y)
    torch.testing.assert_close(found.fisher[pattern], expected, rtol=1e-4, atol=1e-12)


class Mean(nn.Module):
    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(width, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.model(ids).last_hidden_state).mean(1)


def gpt2() -> tuple[nn.Module, dict[str, tuple[dict[str, Any], int]]]:
    config = GPT2Config(vocab_size=9, n_positions=8, n_embd=12, n_layer=1, n_head=HEADS, attn_implementation="eager")
    places = {"model.h.0.attn.c_proj": ({"side": "input", "groups": HEADS}, HEADS), "model.h.0.mlp.c_proj": ({}, 12)}
    return Mean(GPT2Model(config), 12), places | {"model.h.0.mlp.c_fc": ({"side": "input"}, 12)}


def llama() -> tuple[nn.Module, dict[str, tuple[dict[str, Any], int]]]:
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    config = LlamaConfig(vocab_size=9, num_key_value_heads=1, max_position_embeddings=8, **sizes)
    places = {"model.layers.0.self_attn.o_proj": ({"side": "input", "groups": HEADS}, HEADS)}
    return Mean(LlamaModel(config), 12), places | {
        "model.layers.0.mlp.down_proj": ({"side": "input"}, 20),
        "model.layers.0.input_layernorm": ({}, 12),
    }


@pytest.mark.parametrize("make", [gpt2, llama])
def test_models_of_transformers(make: Callable[[], Any]) -> None:
    model, places = make()
    model.eval()
    x, y = tokens()
    with Gates(model, {name: options for name, (options, _) in places.items()}) as found:
        cross_entropy(model(x), y).backward()
    for name, (options, count) in places.items():
        expected = by_masks(model, name, options.get("side", "output"), -1, count, x, y)
        torch.testing.assert_close(found.fisher[name], expected, rtol=1e-4, atol=1e-12)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (lambda: nn.Conv2d(4, 6, 3, padding=1), 4),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), 4),
    "dilated": (lambda: nn.Conv2d(4, 6, 2, dilation=2), 4),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), 4),
    "norm": (lambda: nn.GroupNorm(2, 4), 4),
    "slopes": (lambda: nn.PReLU(4), 4),
}


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_channels_of_maps(kind: str, side: str) -> None:
    make, channels = CONVOLUTIONS[kind]
    layer = make()
    model = nn.Sequential(nn.Conv2d(2, 4, 1), layer, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x, y = torch.randn(5, 2, 6, 6), torch.randint(4, (5,))
    if side == "input" and kind in ("norm", "slopes"):
        with pytest.raises(UnsupportedError, match="neither a linear layer nor a convolution"):
            Gates(model, {"1": {"side": side}}, fisher="sampled")
        return
    with Gates(model, {"1": {"side": side}}, fisher="sampled") as gates:
        cross_entropy(model(x), y).backward()
    count = channels if side == "input" or kind in ("norm", "slopes") else 6
    torch.testing.assert_close(gates.fisher["1"], by_masks(model, "1", side, 1, count, x, y), rtol=1e-4, atol=1e-12)


def test_samples_on_another_axis() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.last = nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.act(self.first(x)))

    def loss_fn(outputs: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(outputs.mean(0), y)

    model, x, y = Steps(), torch.randn(7, 5, 3), torch.randint(4, (5,))
    places = {"last": ("input", 2), "first": ("output", 6), "act": ("output", 6)}
    asked = {"last": {"side": "input", "groups": 2}, "first": {}, "act": {"axis": 2}}
    with Gates(model, asked, batch_axis=1) as gates:
        loss_fn(model(x), y).backward()
    for name, (side, count) in places.items():
        expected = by_masks(model, name, side, -1, count, x, y, loss_fn, 1)
        torch.testing.assert_close(gates.fisher[name], expected, rtol=1e-4, atol=1e-12)


class Nodes(nn.Sequential):
    """Rows are nodes of graphs; ``graph`` says of which."""

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        return super().forward(x)


class FeaturesFirst(nn.Sequential):
    """Inputs have their samples on the second axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.T)


def gates_by_hand(model: nn.Sequential, parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Gates on the output of the first layer and, in two blocks, on the input of the last, one sample at a time."""
    found = {"0": torch.zeros(6).double(), "2": torch.zeros(2).double()}
    for x, y in parts:
        masks = [torch.ones_like(total, requires_grad=True) for total in found.values()]
        hidden = model[1](model[0](x) * masks[0])
        loss = cross_entropy(model[2](hidden * masks[1].repeat_interleave(3)), y, reduction="sum")
        for total, g in zip(found.values(), torch.autograd.grad(loss, masks), strict=True):
            total += g.square() / len(parts)
    return found


@pytest.mark.parametrize("words", ["sample_of", "n_samples"])
def test_samples_that_the_user_counts(words: str) -> None:
    graph, x, y = torch.tensor([0, 0, 1, 2, 2, 2, 1]), torch.randn(7, 4).double(), torch.randint(3, (7,))
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)
    model = (Nodes if words == "sample_of" else FeaturesFirst)(*layers).double()
    told: dict[str, Any] = {"sample_of": "graph"} if words == "sample_of" else {"n_samples": 7}
    given = (x, graph) if words == "sample_of" else (x.T,)
    with Gates(model, {"0": {}, "2": {"side": "input", "groups": 2}}, "sum", **told) as gates:
        cross_entropy(model(*given), y, reduction="sum").backward()
    rows = [graph == n for n in range(3)] if words == "sample_of" else list(torch.eye(7).bool())
    expected = gates_by_hand(model, [(x[where], y[where]) for where in rows])
    assert gates.n_samples == len(rows)
    for name, values in expected.items():
        torch.testing.assert_close(gates.fisher[name], values, rtol=1e-10, atol=0)


def test_two_calls_share_the_gates_on_their_input() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    model, x, y = Twice(), torch.randn(6, 4), torch.randint(4, (6,))
    with Gates(model, {"layer": {"side": "input"}}) as gates:
        cross_entropy(model(x), y).backward()
    expected = by_masks(model, "layer", "input", -1, 4, x, y)
    torch.testing.assert_close(gates.fisher["layer"], expected, rtol=1e-4, atol=1e-12)


def test_under_autocast_the_input_has_the_gradient_that_autograd_gives_it() -> None:
    model, x, y = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(5, 8), torch.randint(4, (5,))
    with Gates(model, {"2": {"side": "input"}}) as gates, torch.autocast("cpu", torch.bfloat16):
        cross_entropy(model(x), y).backward()
    total = torch.zeros(6, dtype=torch.float64)
    for n in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model[1](model[0](x[n : n + 1])).detach().requires_grad_()
            loss = cross_entropy(model[2](hidden), y[n : n + 1])
        (gradient,) = torch.autograd.grad(loss, hidden)
        total += (hidden.double() * gradient.double()).square()[0].detach() / 5
    # Each number is rounded to 8 bits, alone as in the batch: a per cent or two in a square.
    torch.testing.assert_close(gates.fisher["2"], total, rtol=3e-2, atol=1e-2 * float(total.max()))


def test_under_autocast_an_output_that_was_changed_in_place_is_computed_again_as_it_was() -> None:
    """The layer's weight is cast again; without that, its product has two dtypes."""
    x, y, found = torch.randn(5, 8), torch.randint(4, (5,)), []
    layers = nn.Linear(8, 6), nn.Linear(6, 4)
    for inplace in (True, False):
        model = nn.Sequential(layers[0], nn.ReLU(inplace), layers[1])
        with Gates(model, {"0": {}}) as gates, torch.autocast("cpu", torch.bfloat16):
            cross_entropy(model(x), y).backward()
        found.append(gates.fisher["0"])
    assert torch.equal(*found)


def test_the_last_pattern_counts() -> None:
    model, (x, y) = Transformer(), tokens()
    with Gates(model, {"blocks.*_proj": {}, "*.down_proj": {"side": "input"}}) as gates:
        cross_entropy(model(x), y).backward()
    assert len(gates.fisher) == 12
    assert {len(values) for name, values in gates.fisher.items() if name.endswith("down_proj")} == {20}
    assert gates.places["blocks.0.up_proj"].side == "output"


# What prune makes of them


def test_pruned_heads_are_those_of_a_closed_mask() -> None:
    model, (x, y) = Transformer(), tokens()
    with Gates(model, {"*.o_proj": {"side": "input", "groups": HEADS}}, fisher="sampled") as gates:
        cross_entropy(model(x), y).backward()
    saliency = gates.saliency
    del saliency["blocks.1.o_proj"]
    least = int(saliency["blocks.0.o_proj"].argmin())
    masked = copy.deepcopy(model)
    wrapper = Masked(masked.blocks[0].o_proj, "input", -1, HEADS)
    masked.blocks[0].o_proj = wrapper
    with torch.no_grad():
        wrapper.mask[least] = 0
    prune(model, saliency, amount=1 / HEADS)
    torch.testing.assert_close(model(x), masked(x))
    assert not hasattr(model.blocks[0].o_proj, "bias_mask"), "the bias belongs to the outputs"
    prune(model, saliency, amount=2 / HEADS)
    assert int((model.blocks[0].o_proj.weight_mask == 0).sum()) == 2 * 12 * 4, "what is gone counts"


@pytest.mark.parametrize("kind", ["plain", "grouped", "transposed", "norm"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_pruned_channels_are_those_of_a_closed_mask(kind: str, side: str) -> None:
    if side == "input" and kind == "norm":
        return
    layer = CONVOLUTIONS[kind][0]()
    model = nn.Sequential(nn.Conv2d(2, 4, 1), layer, nn.Flatten())
    x = torch.randn(5, 2, 6, 6)
    with Gates(model, {"1": {"side": side}}, fisher="sampled") as gates:
        model(x).square().sum(1).mean().backward()
    count = len(gates.saliency["1"])
    wrapper = Masked(copy.deepcopy(layer), side, 1, count)
    with torch.no_grad():
        wrapper.mask[gates.saliency["1"].topk(count // 2, largest=False).indices] = 0
    expected = wrapper(model[0](x)).flatten(1)
    prune(model, gates.saliency, amount=0.5)
    torch.testing.assert_close(model(x), expected)


def test_gates_of_an_embedding_close_its_columns() -> None:
    model, (x, y) = Transformer(), tokens()
    with Gates(model, {"embed": {}}, fisher="sampled") as gates:
        cross_entropy(model(x), y).backward()
    prune(model, gates.saliency, amount=0.25)
    assert int((model.embed.weight_mask.sum(0) == 0).sum()) == 3


def test_gates_that_no_mask_closes() -> None:
    model, (x, y) = Transformer(), tokens()
    with Gates(model, {"blocks.0.v_proj": {"axis": 1}}, fisher="sampled") as gates:
        cross_entropy(model(x), y).backward()
    with pytest.raises(ArgumentError, match="on axis 1 of its output, where its weight has no channels"):
        prune(model, gates.saliency, amount=0.5)
    with Gates(model, {"*.o_proj": {"side": "input"}}, fisher="sampled") as gates:
        cross_entropy(model(x), y).backward()
    with pytest.raises(ArgumentError, match="a group's importance takes gates on outputs"):
        GroupImportance(model, gates.saliency)


def test_gates_of_the_datas_labels_predict_nothing() -> None:
    model, (x, y) = Transformer(), tokens()
    with Gates(model, {"*.o_proj": {"side": "input"}}) as gates:
        cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="of the empirical Fisher, whose labels are those of the data"):
        found = gates.saliency
    torch.testing.assert_close(found["blocks.0.o_proj"], gates.fisher["blocks.0.o_proj"] / 2)
    with pytest.raises(ArgumentError, match="fisher must be one of 'empirical', 'sampled', 'observed'"):
        Gates(model, fisher="exact")  # type: ignore[arg-type]


# Nonsense, and what is not known


class Changed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ({"*.proj": {}}, r"no module whose name matches '\*\.proj'"),
        ({}, "no module of those to watch"),
        ({"head": {"sides": "input"}}, "some of the keys 'side', 'groups' and 'axis'"),
        ({"head": "input"}, "some of the keys 'side', 'groups' and 'axis'"),
        ({"head": {"side": "left"}}, r"modules\['head'\]\['side'\] must be one of"),
        ({"head": {"groups": 0}}, r"\['groups'\] must be an int >= 1"),
        ("*.o_proj", r'pass \{"\*\.o_proj": \{\}\} for gates on their outputs'),
        (["head", "embed"], r'pass \{"head": \{\}, "embed": \{\}\}'),
        ([nn.Linear], "a tuple of types of modules"),
        (
            {"*.o_proj": {"side": "input", "groups": 5}},
            "12 channels of its input are no 5 equal groups: groups has to divide 12",
        ),
        ({"blocks.0.v_proj": {"groups": 5}}, "12 channels of its output are no 5 equal groups"),
        ({"head": {"axis": "last"}}, r"\['axis'\] must be an int"),
        ({"blocks.0.act": {}}, r"GELU 'blocks\.0\.act': which axis of its output counts channels is not known"),
        ((nn.GELU,), "which axis of its output counts channels is not known"),
    ],
)
def test_nonsense_is_refused_in_words(modules: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        Gates(Transformer(), modules)


def test_what_the_words_on_names_say_to_pass() -> None:
    for modules in ({"*.o_proj": {}}, {"*.o_proj": {"side": "input", "groups": HEADS}}):
        assert list(Gates(Transformer(), modules).places) == ["blocks.0.o_proj", "blocks.1.o_proj"]


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (Changed(4, 3), "a Linear that changes forward"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), "computed from other tensors"),
        (nn.Conv1d(4, 3, 3, padding="same"), "padding by a number of zeros"),
        (nn.Conv1d(4, 3, 3, padding=1, padding_mode="circular"), "padding by a number of zeros"),
    ],
)
def test_inputs_whose_gradient_is_not_known(layer: nn.Module, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        Gates(nn.Sequential(layer), {"0": {"side": "input"}})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"axis": 1, "groups": 64}, r"\d+ channels of its output are no 64 equal groups"),
        ({"axis": 0}, "axis 0 counts its channels and can't count the samples"),
        ({"axis": 3}, "has no axis 3 that counts channels, but 3 axes"),
    ],
)
def test_places_that_a_call_does_not_have(options: dict[str, Any], words: str) -> None:
    model, (x, y) = Transformer(), tokens()
    with pytest.raises(ShapeError, match=words), Gates(model, {"blocks.0.v_proj": options}):
        cross_entropy(model(x), y).backward()
    assert model.head.weight.grad is not None, "gradients are complete"


def test_an_input_that_is_changed_in_place_is_refused() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.layer.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            outputs = self.layer(x)
            x.add_(1)
            return outputs

    model = Changing()
    with pytest.raises(CoverageError, match="changed in place"), Gates(model, {"layer": {"side": "input"}}):
        model(torch.randn(5, 4)).sum().backward()


# Layers that no gradient reaches, and layers that have no samples


class TwoHeads(nn.Module):
    """A model with a head that the loss uses, one that runs and one that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.used, self.ran = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.idle, self.norm, self.words = nn.Conv2d(2, 5, 1), nn.GroupNorm(1, 7), nn.Embedding(3, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).tanh()
        return self.used(h), self.ran(h)


def test_gates_that_no_loss_depends_on_are_zero() -> None:
    """Closing them costs nothing, so that they are the first to go."""
    model, x, y = TwoHeads(), torch.randn(5, 4), torch.randint(3, (5,))
    places: Any = {"used": {}, "ran": {}, "norm": {}, "idle": {"side": "input"}, "words": {"groups": 2}}
    with Gates(model, places) as gates:
        cross_entropy(model(x)[0], y).backward()
    found = gates.fisher
    assert {name: len(values) for name, values in found.items()} == {
        "used": 3,
        "ran": 2,
        "idle": 2,
        "norm": 7,
        "words": 2,
    }
    assert {name for name, values in found.items() if not values.any()} == {"ran", "idle", "norm", "words"}
    expected = by_masks(model, "used", "output", -1, 3, x, y, lambda outputs, y: cross_entropy(outputs[0], y))
    torch.testing.assert_close(found["used"], expected, rtol=1e-4, atol=1e-12)


class NetworkOnPositions(nn.Module):
    """A model that adds what a network gives for its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.second(self.first(self.table).tanh())).tanh().mean(1))


def test_gates_on_a_layer_that_no_sample_passes_are_refused_with_the_remedy() -> None:
    """The layer on the table itself has the gradient of every sample, and the one behind it has none."""
    model, x, y = NetworkOnPositions(), torch.randn(5, 3, 4), torch.randint(3, (5,))
    with pytest.raises(CoverageError, match=r"second: called without a batch axis.*leave it out"), Gates(model):
        cross_entropy(model(x), y).backward()
    with Gates(model, {"head": {}}) as gates:
        cross_entropy(model(x), y).backward()
    torch.testing.assert_close(
        gates.fisher["head"], by_masks(model, "head", "output", -1, 3, x, y), rtol=1e-4, atol=1e-12
    )


class Adapted(nn.Module):
    """A frozen layer with a trained one beside it, as adapters are."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.beside = nn.Linear(4, 6).requires_grad_(False), nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.frozen(x) + self.beside(x)).tanh())


@pytest.mark.parametrize("frozen", ["the first layer", "all"])
def test_gates_on_frozen_layers(frozen: str) -> None:
    """Closing a gate of a frozen layer changes the outputs as much as closing any other."""
    model, x, y = Adapted(), torch.randn(5, 4), torch.randint(3, (5,))
    model.requires_grad_(frozen != "all")
    model.frozen.requires_grad_(False)
    with Gates(model) as gates:
        cross_entropy(model(x), y).backward()
    for name, count in {"frozen": 6, "beside": 6, "head": 3}.items():
        expected = by_masks(model, name, "output", -1, count, x, y)
        assert expected.any()
        torch.testing.assert_close(gates.fisher[name], expected, rtol=1e-4, atol=1e-12)
    assert all(p.requires_grad == (frozen != "all" and "frozen" not in name) for name, p in model.named_parameters())


class OfComplexNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6, dtype=torch.complex128)
        self.second = nn.Linear(6, 5, dtype=torch.complex128)
        self.head = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(torch.complex(x, x.flip(1))).tan()).abs())


def test_gates_of_complex_numbers() -> None:
    """A real mask multiplies real and imaginary parts."""
    model, x, y = OfComplexNumbers(), torch.randn(5, 4).double() / 4, torch.randint(3, (5,))
    with Gates(model, {"first": {}, "second": {}}) as gates:
        cross_entropy(model(x), y).backward()
    for name, found in gates.fisher.items():
        mask = torch.ones(len(found), dtype=torch.float64, requires_grad=True)
        hook = model.get_submodule(name).register_forward_hook(lambda _, args, output, mask=mask: output * mask)
        rows = [torch.autograd.grad(cross_entropy(model(x[n : n + 1]), y[n : n + 1]), mask)[0] for n in range(5)]
        hook.remove()
        torch.testing.assert_close(found, torch.stack(rows).square().mean(0), rtol=1e-10, atol=1e-20)


class AlongSteps(nn.Module):
    """A model that gives a convolution its samples as steps, in a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv1d(4, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x.T[None])[0].T.tanh())


def test_gates_of_a_convolution_whose_steps_are_samples() -> None:
    model, x, y = AlongSteps(), torch.randn(5, 4), torch.randint(3, (5,))
    with Gates(model) as gates:
        cross_entropy(model(x), y).backward()
    expected = by_masks(model, "first", "output", 1, 6, x, y)
    torch.testing.assert_close(gates.fisher["first"], expected, rtol=1e-4, atol=1e-12)


class Merged(nn.Module):
    """A model that takes the weight of a layer which it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.after = nn.Linear(4, 6), nn.Tanh()
        self.low = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(nn.functional.linear(x, self.taken.weight + self.low, self.taken.bias))


def test_gates_on_modules_that_are_never_called() -> None:
    """The error says so, and gates on a module that is called are exact."""
    model, x, y = Merged(), torch.randn(5, 4), torch.randint(6, (5,))
    with Gates(model) as gates:
        cross_entropy(model(x), y).backward()
    with pytest.raises(
        LifecycleError, match=r"1 backward passes went.*put the gates on modules that the forward calls"
    ):
        _ = gates.fisher
    with Gates(model, {"after": {"axis": -1}}) as gates:
        cross_entropy(model(x), y).backward()
    torch.testing.assert_close(
        gates.fisher["after"], by_masks(model, "after", "output", -1, 6, x, y), rtol=1e-4, atol=1e-12
    )
