"""Pictures of the comparison: one row a method with the same seeds in the columns, trade-off curves, studies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.steering.methods import CLEAN, CONDITIONED, ENCODED, GRADIENT_FREE, METHODS, NOISY
from benchmarks.steering.report import best_gradient_free, distance, front, narrowness
from benchmarks.zoo.data import CLASSES
from fastdiff.files import written

__all__ = ["curves", "methods", "pyplot", "studies"]

COLOURS = {GRADIENT_FREE: "#1b6ca8", CLEAN: "#c1440e", NOISY: "#d99a00", ENCODED: "#3f8f5f", CONDITIONED: "#6b4c9a"}
LEAST = 0.1  # a pooled distance may come out at 0 or below
MARKERS = "osD^vP*Xh<>p"


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure, path: Path, dpi: int = 120) -> None:
    with written(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, bbox_inches="tight")
    pyplot().close(figure)


def methods(rows: dict[str, torch.Tensor], labels: list[int], path: Path) -> None:
    """rows: {method: images (K, 1, size, size), uint8}, sample k of each from the same seed, steered to labels[k]."""
    plt = pyplot()
    gap, size = 2, next(iter(rows.values())).shape[-1]
    width = len(labels) * (size + gap) + gap
    figure, axes = plt.subplots(len(rows), 1, figsize=(width / 62, len(rows) * (size + gap) / 62), squeeze=False)
    for i, (axis, (name, images)) in enumerate(zip(axes[:, 0], rows.items())):
        strip = np.full((size, width), 255, np.uint8)
        for k, image in enumerate(images):
            strip[:, gap + k * (size + gap) : gap + k * (size + gap) + size] = image[0].numpy()
        axis.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="equal")
        axis.set_axis_off()
        axis.text(-4, size / 2, name, ha="right", va="center", fontsize=7)
        if i == 0:
            for k in range(len(labels)):
                if k == 0 or labels[k] != labels[k - 1]:
                    axis.text(gap + k * (size + gap), -3, CLASSES[labels[k]], ha="left", va="bottom", fontsize=6)
    figure.subplots_adjust(hspace=0.06)
    save(figure, path, 200)


def curves(results: dict, path: Path) -> None:
    """All trials: accuracy over distance and over diversity. A line joins those of a method that no other of it beats."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2))
    counts: dict[str, int] = {}
    best = best_gradient_free(results)
    for name, found in results["search"].items():
        trials = [t for t in found["trials"] if t.get("pooled") is not None]
        if not trials:
            continue
        kind = METHODS[name].family
        number = counts[kind] = counts.get(kind, -1) + 1
        style = {"color": COLOURS.get(kind, "gray"), "marker": MARKERS[number % len(MARKERS)], "ms": 4}
        for axis, quality, cost in ((axes[0], "pooled", distance), (axes[1], "diversity", narrowness)):
            axis.plot([max(t[quality], LEAST) for t in trials], [t["accuracy"] for t in trials], ls="", alpha=0.25, **style)
            line = front(trials, cost)
            axis.plot(
                [max(t[quality], LEAST) for t in line],
                [t["accuracy"] for t in line],
                lw=2.2 if name == best else 1,
                label=name,
                **style,
            )
    for axis, text in ((axes[0], "distance to the class's real images (pooled, search)"), (axes[1], "diversity")):
        axis.axhline(results["criterion"]["real_accuracy"], color="k", lw=0.8, ls=":")
        axis.set_xlabel(text)
        axis.set_ylabel("accuracy")
        axis.grid(alpha=0.3)
    axes[0].set_xscale("log", subs=(2, 3, 5))
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].xaxis.set_minor_formatter("{x:g}")
    axes[0].tick_params(axis="x", which="both", labelsize=8)
    axes[1].set_xlim(0, 2)
    axes[0].text(
        0.99,
        results["criterion"]["real_accuracy"],
        "real images",
        fontsize=7,
        ha="right",
        va="bottom",
        transform=axes[0].get_yaxis_transform(),
    )
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    save(figure, path)


def heat(axis, values: list[list[float]], across: list, down: list, title: str, *, low=None, high=None) -> None:
    values = np.array(values, dtype=float)
    axis.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    for i, j in np.ndindex(*values.shape):
        if np.isfinite(values[i, j]):
            shade = (values[i, j] - (values.min() if low is None else low)) / max(
                (np.nanmax(values) if high is None else high) - (values.min() if low is None else low), 1e-9
            )
            axis.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=7, color="k" if shade > 0.6 else "w")
    axis.set_xticks(range(len(across)), across, fontsize=7)
    axis.set_yticks(range(len(down)), down, fontsize=7)
    axis.set_title(title, fontsize=8)


def studies(found: dict, path: Path) -> bool:
    """The transfer between noise levels and the blocks. Returns whether there was anything to draw."""
    transfer, blocks = found.get("transfer"), found.get("blocks")
    if not transfer and not blocks:
        return False
    plt = pyplot()
    kinds = list((transfer or blocks)["kinds"])
    lines = 2 * bool(transfer) + bool(blocks)
    figure, axes = plt.subplots(lines, len(kinds), figsize=(4.2 * len(kinds), 3.4 * lines), squeeze=False)
    for j, kind in enumerate(kinds):
        line = 0
        if transfer:
            one, learnt = transfer["kinds"][kind], [f"{s:g}" for s in transfer["learnt"]]
            injected = [f"{low:g}–{high:g}" for low, high in transfer["injected"]]
            heat(
                axes[0, j], one["accuracy"], injected, learnt, f"{kind}: accuracy, learnt at (down) x injected in", low=0, high=1
            )
            heat(
                axes[1, j],
                one["cosine"],
                learnt,
                learnt,
                f"{kind}: cosine of directions, learnt at x learnt at",
                low=-0.2,
                high=1,
            )
            line = 2
        if blocks:
            one = blocks["kinds"][kind]
            for weight, accuracy in zip(blocks["weights"], np.array(one["accuracy"], dtype=float).T):
                axes[line, j].plot(blocks["blocks"], accuracy, marker="o", ms=3, label=f"weight {weight:g}")
            axes[line, j].set_ylim(0, 1)
            axes[line, j].set_title(f"{kind}: accuracy by block", fontsize=8)
            axes[line, j].tick_params(labelsize=7)
            axes[line, j].grid(alpha=0.3)
            axes[line, j].legend(fontsize=6)
    figure.tight_layout()
    save(figure, path)
    return True
