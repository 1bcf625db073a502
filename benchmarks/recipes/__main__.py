"""`python -m benchmarks.recipes DATA`: samples of a published checkpoint, steered or guided with the published settings.

Everything comes from paths: a checkpoint, labelled images, classifiers in Python files. Nothing is downloaded. What was
published and what was not is in benchmarks/recipes/README.md, and --show prints it for one command.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

import fastdiff as fd
from fastdiff.cli import Refused
from fastdiff.files import written
from fastdiff.ops import checked_device

from . import checkpoints, steer
from .images import Images, open_images
from .settings import DATA, GUIDANCE, METHODS, OPTIONS, SIZES, Given, flag, settings, shown, table

__all__ = ["main"]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__.split("\n\n", 1)[1],
                                allow_abbrev=False)
    p.add_argument("data", choices=(*DATA, "table"), help="whose settings; table: all settings as Markdown")
    p.add_argument("--checkpoint", type=Path, help="folder of a diffusers model; .safetensors or .pt of a U-Net of OpenAI or EDM")
    p.add_argument("--images", type=Path, help="FOLDER/CLASS/*.png, or .npz or .safetensors; with --attributes FOLDER/*.png")
    p.add_argument("--attributes", type=Path, help="CSV, or CelebA's text: file names, and 1, 0 or -1 for each attribute")
    p.add_argument("--crop", action=argparse.BooleanOptionalAction, default=None,
                   help="shrink and crop images of another size (default: for imagenet)")
    p.add_argument("--target", action="append", default=[],
                   help="a class or an attribute, \"not X\" too; repeat it for several at once")
    p.add_argument("--method", choices=METHODS, default="na-rfm")
    p.add_argument("--classifier", action="append", default=[], metavar="FILE.py:NAME",
                   help="a function that returns the classifier that guides, x in [-1, 1] -> logits (cg: x, sigma); one a target")
    p.add_argument("--judge", action="append", default=[], metavar="FILE.py:NAME",
                   help="the same, for the one that judges the samples")
    p.add_argument("--label", action="append", type=int,
                   help="the target's class in --classifier and --judge (default: its place among all; of an attribute 1)")
    p.add_argument("--fits", type=Path, help="folder with the fits of an earlier run, in place of new ones")
    p.add_argument("--out", type=Path, help="folder to write samples, fits and report.json to")
    p.add_argument("--count", type=int, default=16, help="how many samples")
    p.add_argument("--seed", type=int, default=0, help="of the first sample; the next have the next seeds")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--show", action="store_true", help="print the settings, with where they are from, and stop")
    unseen = p.add_argument_group("what the weights of OpenAI's networks do not show")
    unseen.add_argument("--size", type=int, help="of the images (default: of the data)")
    unseen.add_argument("--heads", type=int, help="of attention")
    unseen.add_argument("--head-channels", type=int, help="of attention, in place of --heads")
    unseen.add_argument("--schedule", help="linear or cosine")
    unseen.add_argument("--timesteps", type=int, help="of the schedule")
    own = p.add_argument_group("settings in place of the published ones")
    for name, (kind, about) in OPTIONS.items():
        own.add_argument(flag(name), type=kind, help=about, default=argparse.SUPPRESS)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.data == "table":
        print(table())
        return 0
    try:
        return run(args)
    except (ValueError, TypeError, OSError, FloatingPointError, Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """Everything is looked at first, then fitted, then drawn."""
    check_arguments(args)
    started = time.perf_counter()
    checkpoint = checkpoints.load(
        args.checkpoint, size=args.size, usual_size=SIZES[args.data], heads=args.heads, head_channels=args.head_channels,
        schedule=args.schedule, timesteps=args.timesteps, device=args.device)
    own = {name: getattr(args, name) for name in OPTIONS if hasattr(args, name)}
    given = settings(args.data, checkpoint.format, args.method, own)
    s = {name: g.value for name, g in given.items()}
    plan = steer.make_plan(checkpoint, s)
    print_settings(args, checkpoint, given)
    if args.show:
        return 0
    steer.check(checkpoint, plan, s)
    crop = args.data == "imagenet" if args.crop is None else args.crop
    images = open_images(args.images, checkpoint.shape, attributes=args.attributes, crop=crop)
    check_targets(args, images)
    guides = classifiers(args, checkpoint, images, "--classifier")
    judges = classifiers(args, checkpoint, images, "--judge")
    fits = fitted(args, checkpoint, images, s)
    actions = [steer.guide(args.method, guides, args.count, s)] if guides else fits.actions(s)

    ready = time.perf_counter()
    shape = (args.count, *checkpoint.shape)
    samples = fd.sample(checkpoint.model, plan, shape, args.seed, batch_size=s["batch_size"], device=args.device,
                        steering=actions)
    drawn = time.perf_counter()
    report = {
        "data": args.data,
        "method": args.method,
        "targets": args.target,
        "checkpoint": {
            "path": str(args.checkpoint),
            "format": checkpoint.format,
            "shape": checkpoint.shape,
            "block": s.get("block") or checkpoint.block,
            "notes": checkpoint.notes,
        },
        "settings": {name: {"value": shown(g.value), "source": g.source} for name, g in given.items()},
        "count": args.count,
        "seed": args.seed,
        "fits": fits.described(),
        "calls of the network without steering": plan.evaluations,
        "evaluations of guidance": actions[0].counts if guides else None,
        "seconds": {"loading and fitting": round(ready - started, 3), "sampling": round(drawn - ready, 3)},
        "judged right": steer.share_right(judges, samples, s["batch_size"]) if judges else None,
    }
    write(args.out, samples.cpu(), plan, report, fits)
    return 0


# ---- what is looked at first


def check_arguments(args) -> None:
    needed = ("checkpoint",) if args.show else ("checkpoint", "images", "out")
    for name in needed:
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing: a path is taken")
    if args.count < 1:
        raise ValueError(f"--count is {args.count}: 1 or more is taken")
    if args.out is not None:
        check_folder(args.out)
    args.device = checked_device(args.device)
    if not args.show and bool(args.classifier) != (args.method in GUIDANCE):
        what = "given" if args.classifier else "not given"
        raise ValueError(f"--classifier was {what}, and goes with {', '.join(GUIDANCE)}: the method is {args.method}")


def check_folder(path: Path) -> None:
    """Raises ``ValueError`` where no folder is or can be made."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out is {path}, and {there} is no folder that can be written to")


def check_targets(args, images: Images) -> None:
    if args.target:
        images.all_of(args.target)
    elif args.method != "none" or args.judge:
        names = ", ".join(images.classes[:12]) + ", ..." * (len(images.classes) > 12)
        raise ValueError(f"--target is missing: one or more of {names} are taken")


def classifiers(args, checkpoint, images: Images, option: str) -> list[steer.Classifier]:
    specs = getattr(args, option.removeprefix("--"))
    noisy = option == "--classifier" and args.method == "cg"
    shape = checkpoint.shape
    return steer.opened(specs, option, images, args.target, args.label, args.device, shape, noisy) if specs else []


def fitted(args, checkpoint, images: Images, s: dict) -> steer.Fits:
    if args.method == "none" or args.method in GUIDANCE:
        return steer.Fits()
    if args.fits:
        return steer.Fits.load(args.fits, checkpoint, args.method, args.target)
    return steer.fit(checkpoint, images, args.target, args.method, s)


# ---- what is shown and written


def print_settings(args, checkpoint, given: dict[str, Given]) -> None:
    print(f"{args.data}: {DATA[args.data]}")
    print(f"{args.checkpoint}: {checkpoint.format}, images {' x '.join(map(str, checkpoint.shape))}, last block of the encoder "
          f"{checkpoint.block}")
    for note in checkpoint.notes:
        print(f"note: {note}")
    for name, g in given.items():
        print(f"  {flag(name):18} {shown(g.value):16} {g.source}")


def write(out: Path, samples: torch.Tensor, plan: fd.Plan, report: dict, fits: steer.Fits) -> None:
    from safetensors.torch import save_file

    from fastdiff.demo import save_grids

    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "samples.safetensors", out / "samples.png", out / "report.json"]
    with written(paths[0]) as temporary:
        save_file({"samples": samples}, temporary, metadata={"plan": plan.to_json(), "report": json.dumps(report)})
    save_grids(paths[1], {f"{report['data']}, {report['method']}, {' and '.join(report['targets']) or 'no target'}": samples})
    with written(paths[2]) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    for path in [*paths, *fits.save(out)]:
        print(path)
    if report["judged right"] is not None:
        print(f"judged right: {report['judged right']:.1%}")


if __name__ == "__main__":
    sys.exit(main())
