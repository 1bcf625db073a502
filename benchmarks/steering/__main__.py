"""`python -m benchmarks.steering`: the comparison of steering and guidance, hours of work that can be stopped and gone on with.

Writes benchmarks/results/steering.json, the pictures beside docs/steering.md, and that document's section.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import time
from pathlib import Path

import benchmarks.zoo.threads  # noqa: F401  isort: skip  (before torch)
import torch

from benchmarks.steering import plots, report, short
from benchmarks.steering.budget import BUDGETS, Budget
from benchmarks.steering.methods import METHODS
from benchmarks.steering.progress import Bar, hours
from benchmarks.steering.run import Run, in_columns
from benchmarks.steering.store import Differs, Stopped, check_context, write_json
from benchmarks.steering.world import Sampler, World, load_world
from benchmarks.zoo import data
from benchmarks.zoo.threads import keep_memory
from benchmarks.zoo.unet import WEIGHTS
from fastdiff.noise import unknown
from fastdiff.ops import checked_device

ROOT = Path(__file__).parents[2]
RESULTS, WORK, DOCUMENT = (
    ROOT / "benchmarks" / "results" / "steering.json",
    ROOT / "benchmarks" / "results" / "local" / "steering",
    ROOT / "docs" / "steering.md",
)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m benchmarks.steering", description=__doc__.split("\n\n")[0])
    p.add_argument("--budget", choices=BUDGETS, default="medium", help="how much is searched and drawn (default medium)")
    p.add_argument("--methods", help=f"comma-separated, of: {', '.join(METHODS)} (default all)")
    p.add_argument("--classes", help="comma-separated names or numbers (default: those of the budget)")
    p.add_argument("--minutes", type=float, help="stop cleanly after so many minutes")
    p.add_argument("--until", help="stop cleanly at this time, HH:MM")
    p.add_argument("--report", action="store_true", help="draw nothing: document and pictures from what is there")
    p.add_argument("--plan", action="store_true", help="measure a batch of each method, say what all will take, and stop")
    p.add_argument("--fresh", action="store_true", help="overwrite results of other weights, data or settings")
    p.add_argument(
        "--stale",
        choices=("refuse", "redo", "keep"),
        default="refuse",
        help="results of other code than the present (default refuse)",
    )
    p.add_argument("--demo", action="store_true", help="the short version: three classes, five methods, stored settings")
    p.add_argument("--data", help="folder with the four idx files (default: $FASHION_MNIST, else the Debian package's)")
    p.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with the networks")
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--work", type=Path, default=WORK, help="folder for the units")
    p.add_argument("--document", type=Path, default=DOCUMENT)
    p.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures of --demo")
    p.add_argument("--steps", type=int, default=Sampler.steps)
    p.add_argument("--batch", type=int, default=Sampler.batch)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the networks are (default cpu)")
    args = p.parse_args(argv)
    try:
        checked_device(args.device)
    except ValueError as error:
        p.error(str(error))
    args.methods = chosen_methods(p, args.methods)
    args.classes = chosen_classes(p, args.classes) if args.classes else None
    if args.threads < 1 or args.steps < 2 or args.batch < 2:
        p.error("--threads must be at least 1, --steps and --batch at least 2")
    args.stop = deadline(p, args.minutes, args.until)
    return args


def chosen_methods(parser, text: str | None) -> list[str] | None:
    """None: all."""
    if not text:
        return None
    names = [n.strip() for n in text.split(",")]
    for name in names:
        if name not in METHODS:
            parser.error(unknown("method", name, METHODS))
    return names


def chosen_classes(parser, text: str) -> tuple[int, ...]:
    found = []
    for name in (n.strip() for n in text.split(",")):
        if name.isdigit() and int(name) < len(data.CLASSES):
            found.append(int(name))
        elif name in data.CLASSES:
            found.append(data.CLASSES.index(name))
        else:
            parser.error(unknown("class", name, data.CLASSES))
    return tuple(sorted(set(found)))


def deadline(parser, minutes: float | None, until: str | None) -> float | None:
    """Seconds since the epoch."""
    ends = []
    if minutes is not None:
        ends.append(time.time() + 60 * minutes)
    if until is not None:
        try:
            at = datetime.datetime.strptime(until, "%H:%M").time()
        except ValueError:
            parser.error(f"--until is {until!r}: HH:MM is taken")
        now = datetime.datetime.now()
        end = datetime.datetime.combine(now.date(), at)
        ends.append((end if end > now else end + datetime.timedelta(days=1)).timestamp())
    return min(ends, default=None)


def read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None


def keeper(path: Path, held: dict | None):
    """Writes results as they come; never fewer of them over more of the same run."""

    def size(results):
        return sum(len(results[k]) for k in ("search", "results", "memory", "studies")) + (results["timing"] is not None)

    def keep(results):
        if held is None or size(results) >= size(held):
            write_json(path, results)

    return keep


def print_cost(run: Run) -> float:
    """What everything will take, as a table; returns the seconds of search, results, timing and studies together."""
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "ms / image", "search", "results", title="What this will take")
    console = Console(width=None if sys.stdout.isatty() else 110)
    with console.status("measuring") as status:
        costs = run.cost(lambda name: status.update(f"fitting, and measuring a batch: {name}"))
    for name, cost in costs.items():
        table.add_row(name, f"{1e3 * cost['price']:.0f}", hours(cost["search"]), hours(cost["results"]))
    console.print(table)
    total = run.total(costs)
    console.print(
        f"In all about {hours(total)}, timing and studies included, fits apart; what is there already is not drawn again."
    )
    for name, reason in run.refused.items():
        console.print(f"{name} is left out: {reason}.")
    return total


def pictures(results: dict, run: Run | None, document: Path) -> dict[str, str]:
    """Draws what there is; returns {name: path relative to the document}."""
    folder, found = document.parent, {}
    names = {k: folder / f"steering-{k}.png" for k in ("methods", "curves", "studies")}
    if any(s["trials"] for s in results["search"].values()):
        plots.curves(results, names["curves"])
        found["curves"] = names["curves"].name
    if plots.studies(results["studies"], names["studies"]):
        found["studies"] = names["studies"].name
    if run is not None and (drawn := in_columns(run, results)):
        plots.methods(*drawn, names["methods"])
    if names["methods"].is_file():
        found["methods"] = names["methods"].name
    return found


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    torch.set_num_threads(args.threads)
    try:
        return short.main(args) if args.demo else compare(args)
    except (Differs, data.DataError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def compare(args: argparse.Namespace) -> int:
    held = read(args.results)
    if args.report:
        if held is None:
            raise FileNotFoundError(f"{args.results} is not there: there is nothing to report yet")
        return finish(args, held, replaying(args, held))
    run = Run(opened(args), METHODS, wanted(args), until=args.stop, only=args.methods)
    if not args.fresh and held is not None:
        check_context(
            {**held["context"], "budget": held["budget"]},
            {**run.world.context, "budget": in_json(run.budget_json)},
            str(args.results),
        )
    try:
        total = print_cost(run)
        if args.plan:
            return 0
        run.bar = Bar(total)
        try:
            run.comparison(keeper(args.results, None if args.fresh else held))
        finally:
            run.bar.close()
    except Stopped:
        print(f"stopped in time, {run.drawn} units drawn; the same command goes on", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"interrupted, {run.drawn} units drawn; the same command goes on", file=sys.stderr)
        finish_if(args, run)
        return 130
    return finish_if(args, run)


def in_json(value):
    return json.loads(json.dumps(value))


def opened(args: argparse.Namespace) -> World:
    return load_world(
        args.work,
        data_folder=args.data,
        weights=args.weights,
        sampler=Sampler(steps=args.steps, batch=args.batch),
        stale=args.stale,
        device=args.device,
    )


def wanted(args: argparse.Namespace) -> Budget:
    return dataclasses.replace(BUDGETS[args.budget], **({"classes": args.classes} if args.classes else {}))


def replaying(args: argparse.Namespace, held: dict) -> Run | None:
    """For the picture of a report: a run that draws nothing, of the results' budget. None without the data."""
    try:
        world = opened(args)
    except (data.DataError, FileNotFoundError):
        return None
    classes = tuple(data.CLASSES.index(c) for c in held["budget"]["classes"])
    return Run(world, METHODS, Budget(**{**held["budget"], "classes": classes}), drawing=False)


def finish_if(args, run) -> int:
    held = read(args.results)
    return 0 if held is None else finish(args, held, run)


def finish(args: argparse.Namespace, results: dict, run: Run | None) -> int:
    """Document and pictures."""
    if run is not None:
        run.drawing = False
    args.document.parent.mkdir(parents=True, exist_ok=True)
    report.write_section(args.document, report.render(results, pictures(results, run, args.document)))
    if args.results == RESULTS:
        short.store_settings(results)
    print(f"{args.results}\n{args.document}")
    return 0


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
