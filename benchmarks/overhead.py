"""`python -m benchmarks.overhead --alignment NA --concept CONCEPT`: what a steered step costs over an unsteered one, by batch and device.

The zoo's network, Euler, nine levels from sigma 2 to 0.5, all of them steered. NA, CONCEPT: files that `NoiseAlignment.save` and
`Concept.save` wrote, learnt on the zoo's data and network, so that no data is needed where this runs. Ways in random order, medians.
Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

import torch

import fastdiff as fd
from benchmarks.steering.store import write_json
from benchmarks.steering.studies import AMPLIFIED, LEVELS
from benchmarks.zoo import unet
from benchmarks.zoo.threads import keep_memory
from fastdiff.ops import checked_device
from fastdiff.steering import Concept, NoiseAlignment

WEIGHT = 2.0


def ways(alignment: NoiseAlignment, concept: Concept) -> dict[str, list]:
    def aligned(**options):
        return [alignment.at(WEIGHT, (0.0, 80.0), next(iter(alignment.targets)), **options)]

    return {
        "unsteered": [],
        "NA": aligned(),
        "NA, projections and sums": aligned(how="lift"),
        "NA, a matrix for each level": aligned(how="map"),
        "concept": [concept.at(AMPLIFIED["weight"])],
        f"concept, amplified by {AMPLIFIED['scale']:g}": [concept.at(**AMPLIFIED)],
    }


def measured(net, plan: fd.Plan, each: dict[str, list], batch: int, device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of a step, by way."""
    taken, order = {name: [] for name in each}, random.Random(0)
    for turn in range(rounds + 2):
        for name, steering in order.sample(list(each.items()), len(each)):
            start = time.perf_counter()
            fd.sample(net, plan, (batch, *unet.IMAGE_SHAPE), 0, device=device, steering=steering, progress=False).cpu()  # waits for a GPU
            if turn > 1:  # the first two warm up
                taken[name].append((time.perf_counter() - start) / len(LEVELS))
    return {name: statistics.median(t) for name, t in taken.items()}


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.split("\n\n")[0])
    p.add_argument("--alignment", type=Path, required=True)
    p.add_argument("--concept", type=Path, required=True)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--batches", type=int, nargs="+", default=[64])
    p.add_argument("--rounds", type=int, default=12)
    p.add_argument("--json", type=Path, help="file for the figures")
    args = p.parse_args(argv)
    device = checked_device(args.device)
    net = unet.load(device=device).to(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False
    each = ways(NoiseAlignment.load(args.alignment), Concept.load(args.concept))
    plan = fd.plan("euler", schedule="edm", prediction="edm", sigmas=[*LEVELS, 0.0], sigma_data=unet.SIGMA_DATA)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    found = {"device": where, "torch": torch.__version__, "rounds": args.rounds, "levels": LEVELS, "batches": {}}
    for batch in args.batches:
        seconds = measured(net, plan, each, batch, device, args.rounds)
        found["batches"][batch] = {name: {"seconds_per_step": s, "over_unsteered": s / seconds["unsteered"]} for name, s in seconds.items()}
        for name, s in seconds.items():
            print(f"batch {batch:5}  {name:30} {1e3 * s:8.2f} ms a step  {s / seconds['unsteered']:.3f}", flush=True)
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    keep_memory()
    main()
