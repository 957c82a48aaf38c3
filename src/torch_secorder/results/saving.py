"""Statistics in files: tensors and one line of JSON, nothing that a reader would execute."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from torch_secorder.errors import ArgumentError

KEY = "torch_secorder"


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write tensors, lists of tensors and JSON values; the file appears complete or not at all."""
    held: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            held[name] = value.detach().cpu().contiguous()
        elif isinstance(value, list) and value and all(isinstance(item, Tensor) for item in value):
            plain[name] = {"tensors": len(value)}
            held |= {f"{name}/{i}": item.detach().cpu().contiguous().clone() for i, item in enumerate(value)}
        else:
            plain[name] = {"value": value}
    save_tensors(held, {KEY: json.dumps(plain)}, path)


def save_tensors(held: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write named tensors and metadata; the file appears complete or not at all.

    Raises:
        ArgumentError: if there is no such folder.
        ImportError: without safetensors.
    """
    files = _safetensors()
    if not path.parent.is_dir():
        raise ArgumentError(f"{path}: there is no folder {path.parent}")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        files.save_file(dict(held), temporary, metadata=dict(metadata))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: Path) -> dict[str, Any]:
    """The state that :func:`save` wrote.

    Raises:
        ArgumentError: naming the file, if this library did not write it, or if it is not whole.
        ImportError: without safetensors.
    """
    files = _safetensors()
    if not path.is_file():
        raise ArgumentError(f"{path}: no such file")
    try:
        with files.safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(KEY)
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except Exception as error:
        raise ArgumentError(f"{path} is not a whole file of this library: {error}") from error
    if about is None:
        raise ArgumentError(f"{path} is a file of tensors, but not of this library: FisherMonitor.save writes them")
    state: dict[str, Any] = {name: value for name, value in held.items() if "/" not in name}
    for name, what in json.loads(about).items():
        state[name] = [held[f"{name}/{i}"] for i in range(what["tensors"])] if "tensors" in what else what["value"]
    return state


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("files of statistics need safetensors: pip install 'torch-secorder[save]'") from error
    return type(
        "Files", (), {"safe_open": safetensors.safe_open, "save_file": staticmethod(safetensors.torch.save_file)}
    )
