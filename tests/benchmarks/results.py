"""What was measured, as JSON files beside this one, and on what machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "backpack-for-pytorch", "opacus", "curvlinops-for-pytorch")


def machine() -> dict[str, Any]:
    """The processor, the system and the versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
    }


def processor() -> str:
    """Its name, and the numbers of its family and model: some virtual machines give one name to several generations."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    numbers = [
        f"{what} {known[name]}" for what, name in (("family", "cpu family"), ("model", "model")) if name in known
    ]
    return ", ".join([known.get("model name", "unknown"), *numbers])


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def saved(name: str) -> dict[str, Any]:
    """What was measured under that name before, or nothing."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"machine": {}, "rows": {}}


def save(name: str, rows: dict[str, dict[str, Any]]) -> None:
    """Put rows beside, or in the place of, those that were saved: by workload, then by variant."""
    merged = saved(name)["rows"]
    for key, row in rows.items():
        merged[key] = merged.get(key, {}) | row
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), "rows": merged}, indent=1, sort_keys=True)
    (FOLDER / f"{name}.json").write_text(text + "\n")
