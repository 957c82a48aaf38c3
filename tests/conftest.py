"""Every test starts from the same random state and leaves torch's defaults as they were."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    default_dtype = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == default_dtype
    assert torch.is_grad_enabled()
