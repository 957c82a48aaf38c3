"""Pictures of reports and of what is decided with them. Needs matplotlib: ``pip install 'torch-secorder[plot]'``.

Every function draws into the Axes that it is given, or into those of a new figure, and returns them.
"""

from torch_secorder.plotting.decisions import predicted_against_measured, sensitivity_by_bits
from torch_secorder.plotting.pages import styled
from torch_secorder.plotting.reports import bars, heat_strip, time_series

__all__ = [
    "bars",
    "heat_strip",
    "predicted_against_measured",
    "sensitivity_by_bits",
    "styled",
    "time_series",
]
