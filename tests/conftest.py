"""Every test starts from the same random state and leaves torch's defaults as they were.

``SEED=3 pytest`` starts from another one: a test that passes for one seed only has found what it looks for by luck.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Two folders run by themselves: torch is told of the pretend device for good, and a GPU is seldom there."""
    apart = collection_path.name in ("pretend", "on_gpu")
    return True if apart and not any(collection_path.name in argument for argument in config.args) else None


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(int(os.environ.get("SEED", "0")))
    default_dtype = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == default_dtype
    assert torch.is_grad_enabled()
