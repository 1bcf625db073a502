"""The short version, for `make demo`: three classes, five methods, settings that the full comparison found (demo.json)."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch

from benchmarks.steering import plots
from benchmarks.steering.budget import Budget
from benchmarks.steering.methods import METHODS
from benchmarks.steering.progress import hours
from benchmarks.steering.report import best_gradient_free, passes
from benchmarks.steering.run import Run, in_columns
from benchmarks.steering.store import write_json
from benchmarks.steering.world import Sampler, World, load_world
from benchmarks.zoo import data
from benchmarks.zoo.data import CLASSES

__all__ = ["SETTINGS", "main", "settings_of", "show"]

SETTINGS = Path(__file__).parent / "demo.json"
TARGETS, SAMPLES, BATCH = (1, 6, 8), 32, 48


def settings_of(results: dict) -> dict:
    """The demo's methods at the settings that a comparison found: {method: setting}."""
    names = dict.fromkeys(["unguided", "NA", best_gradient_free(results) or "NA + RFM", "classifier guidance", "DPS"])
    if len(names) == 4:  # noise alignment alone is the best
        names = dict.fromkeys(["unguided", "NA", "NA + RFM", "classifier guidance", "DPS"])
    found = {n: results["search"].get(n, {}).get("best") for n in names}
    return found if None not in found.values() else {}


def store_settings(results: dict, path: Path = SETTINGS) -> None:
    """Keeps the settings of a complete comparison."""
    if results["complete"] and (found := settings_of(results)):
        write_json(path, {"network": results["context"]["unet"], "settings": found})


def main(args) -> int:
    """What `python -m benchmarks.steering --demo` does. Without the data there is nothing to fit to: it says so."""
    try:
        data.find_folder(args.data)
    except data.DataError as error:
        print(f"Steering is not shown: {error}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        world = load_world(
            Path(folder),
            data_folder=args.data,
            weights=args.weights,
            sampler=Sampler(steps=args.steps, batch=BATCH),
            device=args.device,
        )
        stored = json.loads(SETTINGS.read_text())
        if stored["network"] != world.context["unet"]:
            print("The settings were found for other weights of the network than these: the figures are not at their best.")
        show(world, stored["settings"], args.out, classes=args.classes or TARGETS)
    return 0


def show(
    world: World, settings: dict[str, dict], out: Path, *, classes: tuple[int, ...] = TARGETS, samples: int = SAMPLES
) -> list[dict]:
    """Draws, prints the table, writes out/steering.png. Returns the table's rows."""
    from rich.console import Console
    from rich.table import Table

    budget = Budget(
        settings=1,
        extra=0,
        search_samples=0,
        samples=samples,
        samples_recurrent=samples,
        rounds=1,
        extra_samples=0,
        classes=classes,
        draws=2,
    )
    run = Run(world, {name: METHODS[name] for name in settings}, budget, targets=classes)
    console, rows = Console(width=None if _terminal() else 120), []
    results = {"results": {}}
    for name, setting in settings.items():
        with console.status(name) if _terminal() else nullcontext():
            found = run.result(run.methods[name], setting)
        results["results"][name] = found
        fitted = sum(run.fits.cost(f) or 0.0 for f in run.methods[name].uses(setting))
        rows.append(
            {
                "method": name,
                **{k: found.get(k) for k in ("accuracy", "pooled", "diversity", "seconds_per_image", "counts")},
                "fits": fitted,
            }
        )
    table = Table(
        title=f"{samples} images of each of {', '.join(CLASSES[c] for c in classes)}; {torch.get_num_threads()} threads"
    )
    table.add_column("method", no_wrap=True)
    for column in ("accuracy", "distance", "diversity", "ms / image", "U-Net passes", "backward", "classifier passes", "offline"):
        table.add_column(column, justify="right")
    real = run.real()
    table.add_row(
        "real test images", f"{real['accuracy']:.2f}", f"{real['pooled']:.1f}", f"{real['diversity']:.2f}", "", "", "", "", ""
    )
    for r in rows:
        counts = r["counts"] or {}
        table.add_row(
            r["method"],
            f"{r['accuracy']:.2f}",
            f"{r['pooled']:.1f}",
            f"{r['diversity']:.2f}",
            f"{1e3 * r['seconds_per_image']:.0f}",
            f"{(counts.get('encoder', 0) + counts.get('decoder', 0)) / 2:.0f}",
            f"{counts.get('decoder backward', 0):.0f}",
            passes(counts, "classifier"),
            hours(r["fits"]) if r["fits"] else "",
        )
    console.print(table)
    console.print(
        "accuracy: of a judge that guides nobody; distance: squared Frechet, in its features, pooled over the classes; "
        "diversity: of the features, 1 for real images."
    )
    out.mkdir(parents=True, exist_ok=True)
    plots.methods(*in_columns(run, results, each=6), out / "steering.png")
    console.print(str(out / "steering.png"))
    return rows


def _terminal() -> bool:
    return os.isatty(1)
