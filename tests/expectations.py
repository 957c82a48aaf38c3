"""What is expected of a case, as its data say: a number that is right, or a refusal in certain words."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from torch_secorder.errors import CurvatureError


def expectation(refusal: str = "") -> AbstractContextManager[Any]:
    """What happens inside must go well or, if there is a `refusal`, raise a CurvatureError whose text this expression finds."""
    return pytest.raises(CurvatureError, match=refusal) if refusal else nullcontext()
