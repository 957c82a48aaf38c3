"""What a model can be called with: candidates by the names of its forward's arguments, most complete first."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES, TOKENS, FRAMES = 5, 7, 2
Inputs = dict[str, Tensor]


def found(config: Any, *names: str, default: int) -> int:
    """The first of the names that the configuration or one of those inside of it has, as a number."""
    stack = [config]
    while stack:
        values = {k: v for k, v in vars(stack.pop(0)).items() if not k.startswith("_")}
        for name in names:
            value = values.get(name)
            value = value[-1] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        stack += [value for value in values.values() if hasattr(value, "to_dict")]
    return default


def numbers(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape)


def words(length: int, top: int) -> Tensor:
    return torch.randint(min(5, top - 1), max(min(5, top - 1) + 1, min(top, 79)), (SAMPLES, length))


def options(name: str, config: Any) -> list[Tensor]:
    """Tensors that an argument of this name may be, in the order in which they are tried."""
    side = found(config, "image_size", "img_size", default=64)
    channels = found(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if channels <= 16 else 3
    mels = found(config, "num_mel_bins", "input_feat_per_channel", "num_mels", "feature_size", "input_size", default=80)
    top = found(config, "vocab_size", default=30)
    width = found(config, "hidden_size", "d_model", "n_embd", "dim", default=32)
    frames = found(config, "num_frames", default=FRAMES)
    if name in ("input_ids", "decoder_input_ids", "text_input_ids"):
        return [words(TOKENS, top), words(16, top)]
    if name in ("pixel_values", "images", "image", "pixel_values_images", "pixel_values_large"):
        sides = dict.fromkeys((side, 64, 32, 224))
        return [numbers(channels, s, s) for s in sides] + [
            numbers(frames, channels, side, side),
            numbers(1, channels, side, side),
        ]
    if name in ("pixel_values_videos", "videos"):
        return [numbers(frames, channels, side, side), numbers(channels, frames, side, side)]
    if name in ("input_values", "audio_values", "waveform", "audio", "audio_codes"):
        return [
            numbers(1600),
            numbers(1, 1600),
            numbers(1, 3200),
            numbers(found(config, "max_length", default=64), mels),
            numbers(mels, 32),
        ]
    if name in ("input_features", "audio_features", "spectrogram", "audio_input_features"):
        long = 2 * found(config, "max_source_positions", default=32)
        return [
            numbers(1, 64, mels),
            numbers(mels, long),
            numbers(long, mels),
            numbers(mels, 64),
            numbers(64, mels),
            numbers(1, mels, 64),
        ]
    if name in ("past_values", "time_series_values"):
        past = found(config, "context_length", default=32)
        return [
            numbers(past, found(config, "num_input_channels", default=1)),
            numbers(past),
            numbers(past + 7, 1),
            numbers(past + 7),
        ]
    if name in (
        "hidden_states",
        "inputs_embeds",
        "encoder_hidden_states",
        "inputs",
        "x",
        "sequence",
        "features",
        "hidden_state",
    ):
        return [numbers(TOKENS, width), numbers(width, TOKENS), numbers(width), numbers(width, 8, 8)]
    if name in ("bbox",):
        low = torch.randint(0, 9, (SAMPLES, TOKENS, 2))
        return [torch.cat([low, low + 3], -1)]
    if name in ("attention_mask", "past_observed_mask", "pixel_mask", "input_features_mask"):
        return [torch.ones(SAMPLES, TOKENS, dtype=torch.long)]
    if name == "position_ids":
        return [torch.arange(TOKENS).expand(SAMPLES, -1)]
    return [numbers(TOKENS, width)]


def candidates(model: nn.Module, config: Any) -> Iterator[Inputs]:
    """Sets of inputs: with all that the model knows of text, image and sound, then with less."""
    arguments = inspect.signature(model.forward).parameters
    required = [
        n for n, p in arguments.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    main = getattr(model, "main_input_name", "input_ids")
    known = [
        name
        for name in (
            "input_ids",
            "pixel_values",
            "input_values",
            "input_features",
            "past_values",
            "pixel_values_videos",
            "waveform",
        )
        if name in arguments and name not in required
    ]
    decoder = ["decoder_input_ids"] if "decoder_input_ids" in arguments else []
    sets: list[list[str]] = [[*known, *decoder], known]
    sets += [[name, *decoder] for name in dict.fromkeys([main, *known]) if name in arguments]
    sets += [[name] for name in dict.fromkeys([main, *known]) if name in arguments]
    sets.append([])
    seen = set()
    for names in sets:
        names = list(dict.fromkeys([*required, *names]))
        if not names or tuple(names) in seen:
            continue
        seen.add(tuple(names))
        for values in itertools.islice(itertools.product(*(options(name, config) for name in names)), 24):
            yield dict(zip(names, values, strict=True))
