"""Makes a tiny model of an architecture, with inputs on which its forward pass and the gradient of a loss exist."""

from __future__ import annotations

import copy
import inspect
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import SAMPLES, Inputs, candidates, found, options
from .shrinking import attempts, changes

LARGEST = 16_000_000  # parameters: a loop over single samples in float64 stays within seconds
PATIENCE = 30.0  # seconds for all attempts at one architecture


class NotMadeError(Exception):
    """The architecture can't be made small, or can't be called, by what is known here; the reason goes to the table."""


@dataclass
class Made:
    model: nn.Module
    inputs: Inputs
    reached: float = 1.0  # the part of the parameters that the outputs depend on


def first_line(error: BaseException, length: int = 200) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:length]}"


def leaves(outputs: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor among the outputs, with its path."""
    if isinstance(outputs, Tensor):
        yield path, outputs
    elif isinstance(outputs, Mapping):
        for key, value in outputs.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(outputs, (list, tuple)):
        for place, value in enumerate(outputs):
            yield from leaves(value, f"{path}.{place}")


def floating(outputs: Any, samples: int) -> dict[str, Tensor]:
    """What a loss can be about: outputs with a gradient whose first axis counts samples, and no caches."""
    return {
        path: tensor
        for path, tensor in leaves(outputs)
        if tensor.is_floating_point() and tensor.requires_grad and tensor.ndim and len(tensor) == samples
        if tensor.numel() and "past_key_values" not in path and "cache" not in path
    }


def transformers_model(name: str, groups: frozenset[str], pixels: int) -> tuple[Callable[[], nn.Module], Any]:
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    kind = CONFIG_MAPPING[name]
    config = kind(**changes(kind(), groups, pixels))
    model = MODEL_MAPPING[kind]
    model = model[0] if isinstance(model, tuple) else model
    config.use_cache = False  # some caches want layers of a kind that was left out
    return lambda: model(config), config


def small(build: Callable[[], nn.Module]) -> nn.Module:
    """The model, after its size was found without memory."""
    with torch.device("meta"):
        size = sum(p.numel() for p in build().parameters())
    if size > LARGEST:
        raise NotMadeError(f"{size:,} parameters")
    torch.manual_seed(0)
    return build().eval()


def image_tokens(error: BaseException, inputs: Inputs, config: Any) -> Inputs | None:
    """The same inputs with as many places for an image as a multimodal model says it wants."""
    wanted = re.search(r"tokens: (?:torch.Size\()?\[?(\d+).*?features:? (?:torch.Size\()?\[?(\d+)", str(error))
    token = next(
        (
            getattr(config, k)
            for k in ("image_token_id", "image_token_index")
            if isinstance(getattr(config, k, None), int)
        ),
        None,
    )
    if wanted is None or token is None or "input_ids" not in inputs:
        return None
    ids, features = inputs["input_ids"], int(wanted[2])
    now = int((ids[0] == token).sum())
    if not now:
        each = features // SAMPLES
    elif wanted[1] == wanted[2]:  # it counts the elements of the features
        each = now // found(config, "hidden_size", default=1)
    else:
        each = now * features // int(wanted[1])
    if not 0 < each < 300:
        return None
    ids = torch.stack([row[row != token] for row in ids])
    return inputs | {"input_ids": torch.cat([ids[:, :2], torch.full((SAMPLES, each), token), ids[:, 2:]], 1)}


def asked_for(error: BaseException, inputs: Inputs, model: nn.Module, config: Any) -> Inputs | None:
    """The same inputs with one more, if the error says that it has to be given."""
    for name in re.findall(r"\w+", str(error)) if re.search("specif|provide|required|must", str(error)) else ():
        if name in inspect.signature(model.forward).parameters and name not in inputs:
            return inputs | {name: options(name, config)[0]}
    return None


def called(model: nn.Module, config: Any, deadline: float) -> Made:
    """The first candidate that the model takes and that gives outputs with a gradient for each sample.

    The reason why there is none is that of the first candidate, which is the most complete.
    """
    reason = ""
    for inputs in candidates(model, config):
        for _ in range(3):
            if time.monotonic() > deadline:
                raise NotMadeError(f"no more patience; first: {reason}")
            try:
                shown = copy.deepcopy(model)  # some keep tensors of a forward pass, with their graphs
                outputs = shown(**inputs)
                if used := floating(outputs, SAMPLES):
                    weights = [p for p in shown.parameters() if p.requires_grad]
                    loss = sum(t.square().sum() for t in used.values())
                    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
                    return Made(model, inputs, sum(g is not None for g in gradients) / len(weights))
                reason = reason or f"no output with a gradient whose first axis counts samples, from {[*inputs]}"
                break
            except Exception as error:
                reason = reason or first_line(error)
                more = image_tokens(error, inputs, config) or asked_for(error, inputs, model, config)
                if more is None:
                    break
                inputs = more
    raise NotMadeError(reason or "no candidate for its inputs")


def transformers_architecture(name: str) -> Made:
    return best(partial(transformers_model, name))


def best(built: Callable[[frozenset[str], int], tuple[Callable[[], nn.Module], Any]]) -> Made:
    """The first attempt whose inputs reach most of the model, else that which reaches most."""
    deadline = time.monotonic() + PATIENCE
    reasons: list[str] = []
    made: list[Made] = []
    for groups, pixels in attempts():
        try:
            build, config = built(groups, pixels)
            made.append(called(small(build), config, deadline))
            if made[-1].reached > 0.8:
                return made[-1]
        except Exception as error:
            reasons.append(str(error) if isinstance(error, NotMadeError) else first_line(error))
        if time.monotonic() > deadline or len(made) > 2:
            break
    if not made:
        raise NotMadeError(max(dict.fromkeys(reasons), key=reasons.count))
    return max(made, key=lambda one: one.reached)
