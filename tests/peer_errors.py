"""Prints how far other packages' traces are from ours: `python tests/peer_errors.py`.

Each package has its own idea of what it averages over, so that every number needs a factor, and `Peer.scale` has it. With
N samples and C outputs, g_n the gradient of sample n's share as we define it (N times its part of a mean, its part of a
sum), J_n the Jacobian of its outputs, and A_n their curvature:

======================================  ============  ===========================  ============================  =======
what the package calls it               loss          what it returns              ours                          factor
======================================  ============  ===========================  ============================  =======
BackPACK BatchL2Grad, SumGradSquared    CE, MSE mean  sum ||g_n / N||^2            1/N sum ||g_n||^2             N
the same                                CE, MSE sum   sum ||g_n||^2                sum ||g_n||^2                 1
curvlinops EFLinearOperator             CE mean       1/N sum ||g_n||^2            1/N sum ||g_n||^2             1
the same                                CE, MSE sum   sum ||g_n||^2                sum ||g_n||^2                 1
the same                                MSE mean      1/(N C) sum ||C g_n||^2      1/N sum ||g_n||^2             1 / C
BackPACK DiagGGNExact,                  CE mean       1/N sum tr J_n^T A_n J_n     1/N sum tr J_n^T A_n J_n      1
curvlinops GGNLinearOperator            CE sum        sum tr J_n^T A_n J_n         sum tr J_n^T A_n J_n          1
the same                                MSE mean      2/(N C) sum ||J_n||^2        1/N sum ||J_n||^2             C / 2
the same                                MSE sum       2 sum ||J_n||^2              sum ||J_n||^2                 1 / 2
curvlinops FisherMCLinearOperator       all           GGNLinearOperator's, drawn   as GGNLinearOperator          the same
======================================  ============  ===========================  ============================  =======

The two for MSE differ by more than a mean: the loss is the negative logarithm of a Gaussian of variance 1/2, ours has
variance 1. curvlinops' operators are matrices that are never formed; their products with all unit vectors form them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oracles import relative_error
from torch_secorder import empirical_fisher_trace, fisher_report, generalized_fisher_trace

N, C = 6, 3
DRAWS = 500
Traces = dict[str, float]  # by parameter


@dataclass(frozen=True)
class Peer:
    """A package's number.

    Attributes:
        kind: "empirical" or "exact", what it is compared with.
        traces: from model, loss and batch to what the package says, by parameter.
        scale: what that is multiplied by, for a loss and its reduction.
        tolerance: of the relative error; above rounding where the package draws random numbers.
    """

    name: str
    kind: str
    traces: Callable[[nn.Module, nn.Module, Tensor, Tensor], Traces]
    scale: Callable[[nn.Module], float]
    tolerance: float = 1e-10


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False), nn.Sigmoid(), nn.Linear(4, C)]
    return nn.Sequential(*layers), torch.randn(N, 5)


def cnn() -> tuple[nn.Module, Tensor]:
    first, second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 2, stride=2, bias=False)
    layers = [first, nn.ReLU(), nn.MaxPool2d(2), second, nn.Tanh(), nn.Flatten(), nn.Linear(16, C)]
    return nn.Sequential(*layers), torch.randn(N, 2, 8, 8)


MODELS = {"MLP": mlp, "CNN": cnn}
LOSSES = {
    f"{name} {reduction}": loss(reduction=reduction)
    for name, loss in {"CE": nn.CrossEntropyLoss, "MSE": nn.MSELoss}.items()
    for reduction in ("mean", "sum")
}


def setting(model: str, loss: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A model, a loss and a batch, in float64, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, inputs = MODELS[model]()
        targets = torch.randint(C, (N,)) if loss.startswith("CE") else torch.randn(N, C, dtype=torch.float64)
        return net.double(), LOSSES[loss], inputs.double(), targets


# Ours


def ours(kind: str, model: nn.Module, loss_fn: nn.Module, inputs: Tensor, targets: Tensor) -> Traces:
    options = {"reduction": loss_fn.reduction, "loss_type": "mse" if isinstance(loss_fn, nn.MSELoss) else "nll"}
    report = fisher_report(model, loss_fn, (inputs, targets), fisher=kind, progress=False, **options)
    return dict(report["fisher_trace"])


def our_total(kind: str, model: nn.Module, loss_fn: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    if kind == "empirical":
        return float(empirical_fisher_trace(model, loss_fn, inputs, targets))
    loss_type = "mse" if isinstance(loss_fn, nn.MSELoss) else "nll"
    return float(generalized_fisher_trace(model, model(inputs), None, loss_type, reduction=loss_fn.reduction))


# BackPACK


def backpack(extension: str, attribute: str) -> Callable[[nn.Module, nn.Module, Tensor, Tensor], Traces]:
    def traces(model: nn.Module, loss_fn: nn.Module, inputs: Tensor, targets: Tensor) -> Traces:
        import backpack as package
        from backpack import extensions

        model, loss_fn = package.extend(copy.deepcopy(model)), package.extend(copy.deepcopy(loss_fn))
        with package.backpack(getattr(extensions, extension)()):
            loss_fn(model(inputs), targets).backward()
        return {name: float(getattr(p, attribute).sum()) for name, p in model.named_parameters()}

    return traces


def of_samples(loss_fn: nn.Module) -> float:
    return N if loss_fn.reduction == "mean" else 1


# curvlinops


def curvlinops(operator: str, **options: int) -> Callable[[nn.Module, nn.Module, Tensor, Tensor], Traces]:
    def traces(model: nn.Module, loss_fn: nn.Module, inputs: Tensor, targets: Tensor) -> Traces:
        import curvlinops as package

        parameters = dict(model.named_parameters())
        matrix = getattr(package, operator)(
            *(model, loss_fn, list(parameters.values()), [(inputs, targets)]), check_deterministic=False, **options
        )
        diagonal = (matrix @ torch.eye(matrix.shape[1], dtype=inputs.dtype)).diagonal()
        parts = diagonal.split([p.numel() for p in parameters.values()])
        return {name: float(part.sum()) for name, part in zip(parameters, parts, strict=True)}

    return traces


def of_elements(loss_fn: nn.Module) -> float:
    return 1 / C if isinstance(loss_fn, nn.MSELoss) and loss_fn.reduction == "mean" else 1


def of_curvature(loss_fn: nn.Module) -> float:
    if not isinstance(loss_fn, nn.MSELoss):
        return 1
    return C / 2 if loss_fn.reduction == "mean" else 1 / 2


PEERS = (
    Peer("BackPACK BatchL2Grad", "empirical", backpack("BatchL2Grad", "batch_l2"), of_samples),
    Peer("BackPACK SumGradSquared", "empirical", backpack("SumGradSquared", "sum_grad_squared"), of_samples),
    Peer("curvlinops EFLinearOperator", "empirical", curvlinops("EFLinearOperator"), of_elements),
    Peer("BackPACK DiagGGNExact", "exact", backpack("DiagGGNExact", "diag_ggn_exact"), of_curvature),
    Peer("curvlinops GGNLinearOperator", "exact", curvlinops("GGNLinearOperator"), of_curvature),
    Peer(
        *(f"curvlinops FisherMC, {DRAWS} draws", "exact"),
        *(curvlinops("FisherMCLinearOperator", mc_samples=DRAWS), of_curvature, 0.1),
    ),
)


def errors(peer: Peer, model: str, loss: str) -> tuple[float, float]:
    """How far a package's sum is from our scalar function's, and its worst parameter from our report's."""
    found = peer.traces(*setting(model, loss))
    theirs = torch.tensor(list(found.values()), dtype=torch.float64) * peer.scale(LOSSES[loss])
    mine = ours(peer.kind, *setting(model, loss))
    assert list(mine) == list(found), "the same parameters"
    total = torch.tensor(our_total(peer.kind, *setting(model, loss)), dtype=torch.float64)
    worst = relative_error(torch.tensor(list(mine.values()), dtype=torch.float64), theirs)
    return float(relative_error(total, theirs.sum())), float(worst)


def table() -> Iterator[str]:
    yield f"{'relative error of the sum (of the worst parameter)':52}" + "".join(f"{loss:>20}" for loss in LOSSES)
    for peer in PEERS:
        for model in MODELS:
            row = f"{peer.name + ', ' + model:52}"
            for loss in LOSSES:
                row += "{:.1e} ({:.1e})".format(*errors(peer, model, loss)).rjust(20)
            yield row


def main() -> None:
    warnings.simplefilter("ignore")
    for line in table():
        print(line, flush=True)


if __name__ == "__main__":
    main()
