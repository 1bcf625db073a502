"""What a noise-aligned step costs beyond the unsteered one, in the row's bank and as one more input, by rank and batch.

    python -m benchmarks.alignment [--threads 2] [--json FILE]
    python -m benchmarks.alignment --error

Statistics of random numbers serve: nothing there depends on their values. Medians of interleaved calls. With --error: what the
directions that are left out by default change of the map, on Fashion-MNIST, in windows that end at different levels.
"""

import argparse
import json

import numpy as np
import torch

import fastdiff as fd
from benchmarks.timing import interleaved
from benchmarks.zoo.data import load_images
from fastdiff.action import Actions
from fastdiff.files import written
from fastdiff.plan import LIMITS
from fastdiff.steering import Gaussian, NoiseAlignment
from fastdiff.steering.window import rows_in

SHAPES = ((1, 28, 28), (3, 32, 32), (4, 64, 64))
RANKS = (0, 1, 3, 7, 20, 50, 100, 200)
BATCHES = (1, 8, 64)


def statistics(shape, rank, seed):
    """A Gaussian of this rank with a random basis."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel()
    basis = torch.linalg.qr(torch.randn(size, max(rank, 1), generator=generator))[0].T[:rank]
    about = {"count": 0, "shape": list(shape), "range": [-1.0, 1.0], "asked": rank}
    values = 100.0 / torch.arange(1, rank + 1, dtype=torch.float64)
    return Gaussian(torch.zeros(shape, dtype=torch.float64), basis.reshape(rank, *shape).contiguous(), values, 0.0, about)


def step_of(actions, plan, shape):
    """One call of the first row that calls the model, by a model that costs nothing."""
    output = fd.randn(shape, seeds=0)  # not zeros: a latent that shrinks call by call ends in subnormals, which are slow
    acting = Actions(actions, plan, shape, lambda x, t: output)
    acting.select(torch.arange(shape[0]))
    run = fd.Stepper(acting.plan, shape, 0, **acting.bank)
    first = run.row

    def step():
        run.row = first
        run.step(*acting.outputs(run))

    return step


def measured(sample, rank, batch, seconds):
    alignment = NoiseAlignment(statistics(sample, rank, 0), {"target": statistics(sample, rank, 1)})
    plan, shape = fd.plan("euler", schedule="edm", prediction="denoised", steps=10), (batch, *sample)
    columns = 1 + 2 * rank
    ways = ["bank", "lift"] if columns <= LIMITS["bank"] else ["lift"]
    sides = {"plain": step_of([], plan, shape)}
    sides |= {how: step_of([alignment.at(1.0, (0, 100), how=how, rank=rank)], plan, shape) for how in ways}
    times = {side: median for side, (median, *_) in interleaved(sides, seconds=seconds).items()}
    about = {"shape": list(sample), "batch": batch, "rank": rank, "columns": columns}
    return about | {f"{side}_us": t * 1e6 for side, t in times.items()}


def error(window, targets=(1, 6, 8)):
    """The largest error over the window's rows and the targets, of the difference of two denoisers: as a share of its own root
    mean square, and of the data's standard deviation. Test images of all classes, at every level; fitted on training images."""
    images = load_images("train")
    everything = images.batch(slice(None))
    exact = NoiseAlignment.fit({t: everything[images.labels == t] for t in targets}, everything, sigma=0.0)
    plan = fd.plan("euler", schedule="edm", prediction="denoised", steps=50, sigma_min=0.01)
    x0 = load_images("test").batch(slice(256))
    noise = fd.randn(x0.shape, seeds=0)
    relative, absolute = [], []
    for target in targets:
        acting = Actions([exact.at(1.0, window, target, how="lift")], plan, x0.shape, lambda x, t: x)
        acting.select(torch.arange(len(x0)))
        run = fd.Stepper(acting.plan, x0.shape, 0)
        for run.row in np.flatnonzero(rows_in(plan, window))[::3].tolist():
            run.model_input.copy_(x0 + run.sigma * noise)
            added = acting.outputs(run)[-1].double()
            full = exact.targets[str(target)].denoise(run.model_input, run.sigma) - exact.full.denoise(run.model_input, run.sigma)
            missing = float((added - full).square().mean().sqrt())
            relative.append(missing / float(full.square().mean().sqrt()))
            absolute.append(missing / (exact.full.variance / x0[0].numel()) ** 0.5)
    return max(relative), max(absolute)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the times to")
    parser.add_argument("--error", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.error:
        for low in (5.3, 3.3, 1.5, 0.5):
            relative, absolute = error((low, 80.0))
            print(f"window ({low}, 80): {relative:.1%} of the map, {absolute:.1%} of the data's standard deviation", flush=True)
        return
    rows = []
    print(f"{'sample':>12} {'batch':>6} {'columns':>8} {'plain us':>10} {'+ bank us':>10} {'+ lift us':>10}")
    for sample in SHAPES:
        for batch in BATCHES:
            for rank in RANKS:
                row = measured(sample, rank, batch, options.seconds)
                rows.append(row)
                bank = f"{row['bank_us'] - row['plain_us']:10.1f}" if "bank_us" in row else " " * 10
                lift = f"{row['lift_us'] - row['plain_us']:10.1f}"
                print(f"{str(sample):>12} {batch:6} {row['columns']:8} {row['plain_us']:10.1f} {bank} {lift}", flush=True)
    if options.json:
        with written(options.json) as temporary:
            about = {"torch": torch.__version__, "backend": fd.ops.chosen("cpu"), "threads": options.threads,
                     "instruction_set": fd.ops.instruction_set()}
            temporary.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
