"""Hessian, Fisher, sampled and empirical Fisher: which curvature can be trusted, and when?

Trains a small network on handwritten digits and compares the four traces of each layer at several stages of training.
Writes which_curvature.png.
"""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from torch_secorder import fisher_report, hessian_trace

STAGES = (0, 10, 30, 100, 300, 1000, 2000)
COLORS = {"hessian": "#8a8a8a", "exact": "#2f6fb0", "sampled": "#111111", "empirical": "#d9822b"}
LABELS = {
    "hessian": "Hessian",
    "exact": "Fisher, exact",
    "sampled": "Fisher, 1 sample",
    "empirical": "empirical Fisher",
}
loss_fn = nn.CrossEntropyLoss()


class DigitNet(nn.Module):
    """Two convolutions and two linear layers for images of 8 x 8 pixels."""

    def __init__(self, activation):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.hidden = nn.Linear(16 * 4 * 4, 32)
        self.classifier = nn.Linear(32, 10)
        self.activation = activation

    def forward(self, images):
        """The logits of ten digits, [n, 10]."""
        x = self.activation(self.conv2(self.activation(self.conv1(images))))
        return self.classifier(self.activation(self.hidden(x.flatten(1))))


def digits(wrong):
    """1,000 images to train on and 500 to hold out, a share of both with labels drawn at random."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels))[:1500]
    images, labels = images[order], labels[order]
    labels = torch.where(torch.rand(len(labels)) < wrong, torch.randint(10, labels.shape), labels)
    return (images[:1000], labels[:1000]), (images[1000:], labels[1000:])


def stages(model, images, labels):
    """Trains with Adam, and stops by at the stages."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(max(STAGES) + 1):
        if step in STAGES:
            yield step
        rows = torch.randint(len(labels), (64,))
        optimizer.zero_grad()
        loss_fn(model(images[rows]), labels[rows]).backward()
        optimizer.step()


def traces(model, batch, seconds):
    """The four traces of each layer, a row per layer; with the standard error that comes from the Hessian's probes."""
    found, error = {}, 0.0
    for kind in ("hessian", "exact", "sampled", "empirical"):
        start, generator = time.perf_counter(), torch.Generator().manual_seed(0)
        if kind == "hessian":
            report = hessian_trace(model, loss_fn, *batch, num_samples=100, by="module", generator=generator)
            found["stderr"], error = report["hessian_trace_stderr"], report.attrs["trace_stderr"]
        else:
            report = fisher_report(model, loss_fn, batch, fisher=kind, by="module", progress=False, generator=generator)
        seconds[kind] = seconds.get(kind, 0) + time.perf_counter() - start
        found[kind] = report["hessian_trace" if kind == "hessian" else "fisher_trace"]
    return pd.DataFrame(found), error


def totals(model, batch):
    """Loss, accuracy, and the traces of the exact and of the empirical Fisher, on images that the model has not seen."""
    with torch.no_grad():
        outputs = model(batch[0])
    accuracy = float((outputs.argmax(1) == batch[1]).float().mean())
    fishers = (fisher_report(model, loss_fn, batch, fisher=kind, progress=False) for kind in ("exact", "empirical"))
    return float(loss_fn(outputs, batch[1])), accuracy, *(report["fisher_trace"].sum() for report in fishers)


def picture(table):
    """A panel for each layer: the traces as training goes on."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    layers = list(table.index.get_level_values("module").unique())
    panels = figure.subplots(1, len(layers), sharex=True, sharey=True)
    steps = list(table.index.get_level_values("step").unique())
    places = range(len(steps))
    for axes, layer in zip(panels, layers, strict=True):
        rows = table.xs(layer, level="module")
        for kind, color in COLORS.items():
            style = {"color": color, "label": LABELS[kind], "markersize": 5, "linewidth": 1.5}
            if kind == "hessian":
                positive = rows[kind].where(rows[kind] > 0)  # the axis is a logarithm
                axes.errorbar(places, positive, yerr=2 * rows["stderr"], marker="s", capsize=2, **style)
            elif kind == "sampled":
                axes.plot(places, rows[kind], "x", **style | {"markersize": 7, "zorder": 3})
            else:
                axes.plot(places, rows[kind], marker="o", **style)
        axes.set_title(layer, loc="left")
        axes.set_yscale("log")
        axes.set_xticks(places, [f"{step:,}" for step in steps], rotation=60)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("trace")
    figure.supxlabel("training steps", fontsize="medium")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def ratios(table, kind):
    """A trace over that of the exact Fisher: a row per layer, a column per stage."""
    ratio = (table[kind] / table["exact"]).unstack("step").rename(columns="{:,}".format).rename_axis(None)
    return ratio.rename_axis(columns=None).map("{:.3g}".format).to_string()


def main():
    """Train, compare, print, and write which_curvature.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for which_curvature.png")
    parser.add_argument("--activation", default="Tanh", help="a class of torch.nn (%(default)s)")
    parser.add_argument("--wrong", type=float, default=0.0, help="share of labels that are drawn at random")
    parser.add_argument("--quick", action="store_true", help="the first 30 steps only")
    options = parser.parse_args()

    torch.manual_seed(0)
    training, held_out = digits(options.wrong)
    model, found, seconds = DigitNet(getattr(nn, options.activation)()), {}, {}
    print("        on 500 images that it learns from                         on 500 others")
    print(" step   loss  Hessian ± stderr    Fisher   sampled  empirical     correct    Fisher  empirical")
    for step in stages(model, *training):
        if options.quick and step > 30:
            break
        batch = training[0][:500], training[1][:500]
        found[step], error = traces(model, batch, seconds)
        loss, *_ = totals(model, batch)
        _, accuracy, exact, empirical = totals(model, held_out)
        sums = found[step].sum()
        print(
            f"{step:5,} {loss:6.3f} {sums.hessian:8.3g} ± {error:<6.2g} {sums.exact:9.3g} {sums.sampled:9.3g}", end=""
        )
        print(f" {sums.empirical:10.3g}   {accuracy:9.1%} {exact:9.3g} {empirical:10.3g}")

    table = pd.concat(found, names=["step", "module"])
    for kind in ("hessian", "sampled", "empirical"):
        print(f"\n{LABELS[kind]}, over the exact Fisher\n\n{ratios(table, kind)}")
    print("\nSeconds in all:", ", ".join(f"{LABELS[kind]} {spent:.1f}" for kind, spent in seconds.items()))
    options.out.mkdir(parents=True, exist_ok=True)
    picture(table).savefig(options.out / "which_curvature.png", dpi=130)


if __name__ == "__main__":
    main()
