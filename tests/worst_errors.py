"""Prints each rule's worst relative error over all problems: `python tests/worst_errors.py`.

The reference is the float64 loop over samples; parameters whose trace is below the absolute tolerance, such as those
whose gradient is zero by symmetry, are left out.
"""

from __future__ import annotations

import warnings
from collections import defaultdict

import torch
from torch import nn

from oracles import TOLERANCES, per_sample_squared_norms, total, trace
from problems import PROBLEMS
from torch_secorder import FisherMonitor


def worst_errors() -> dict[str, dict[torch.dtype, tuple[float, str]]]:
    """By rule and dtype: the worst relative error of a parameter's trace, and the problem that it occurs in."""
    worst: dict[str, dict[torch.dtype, tuple[float, str]]] = defaultdict(dict)
    for problem in PROBLEMS:
        setting = problem.setting()
        expected = trace(per_sample_squared_norms(setting.model, nn.MSELoss(), setting.inputs, setting.targets))
        for dtype, (_, atol) in TOLERANCES.items():
            setting = problem.setting(dtype)
            with FisherMonitor(setting.model) as monitor:
                setting.loss().backward()
            for name, row in monitor.report().iterrows():
                value = float(expected[str(name)])
                if value > atol * float(total(expected)):
                    error = abs(row["fisher_trace"] - value) / value
                    worst[row["rule"]][dtype] = max(worst[row["rule"]].get(dtype, (0.0, "")), (error, problem.name))
    return worst


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(f"{'rule':45} {'float32':>9} {'float64':>9}  worst float32 problem")
    for rule, errors in sorted(worst_errors().items()):
        single, double = (errors.get(dtype, (0.0, "")) for dtype in (torch.float32, torch.float64))
        print(f"{rule:45} {single[0]:9.1e} {double[0]:9.1e}  {single[1]}")
