"""Every test has the GPU as the default device, as many programs do, and products in full float32."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _by_default() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU, or torch was built without one")
    torch.set_default_device("cuda")
    convolutions = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_default_device(None)
