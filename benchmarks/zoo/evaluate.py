"""Judge the zoo: `python -m benchmarks.zoo.evaluate` writes model_card.json, README.md and samples.png here.

The samples are drawn by `fastdiff.sample`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import benchmarks.zoo.threads  # noqa: F401  isort: skip  (before torch)
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

import fastdiff as fd
from benchmarks.zoo import card, data, metrics
from benchmarks.zoo.classifiers import load_classifier
from benchmarks.zoo.spectral import load_spectral
from benchmarks.zoo.unet import IMAGE_SHAPE, SIGMA_DATA, WEIGHTS, load

HERE = Path(__file__).parent
NETWORKS = ("unet", "unet_cond", "guide", "guide_noisy", "spectral", "judge")
SIGMAS = (0.02, 0.5, 1.0, 2.0, 5.0, 10.0)
FOLDS = 10
STEPS = 18  # of Heun, as Karras et al. 2022 use for images of 32 x 32
SIGMA_RANGE = (0.01, 80.0)


def sample(net: nn.Module, count: int, *, seed: int, steps: int = STEPS, batch: int = 50, quiet: bool | None = None) -> Tensor:
    """Images (count, 1, 28, 28), clipped to [-1, 1], from seeds seed, seed + 1, ... by 2 steps - 1 network calls each:
    Heun of Karras et al. 2022, algorithm 1, without churn, in batches of a fixed size."""
    low, high = SIGMA_RANGE
    plan = fd.plan("heun", schedule="edm", prediction="edm", sigma_min=low, sigma_max=high, sigma_data=SIGMA_DATA, steps=steps)
    progress = None if quiet is None else not quiet
    return fd.sample(net, plan, (count, *IMAGE_SHAPE), seed, batch_size=batch, progress=progress).clamp(-1, 1)


@torch.inference_mode()
def accuracy(
    net: nn.Module, images: data.Images, sigma: float | None = None, batch: int = 500
) -> tuple[float, dict[str, float]]:
    """Share of right answers, over all and per class; with `sigma`, on x0 + sigma n and the network told sigma."""
    generator = torch.Generator().manual_seed(0)
    right = []
    for index in torch.arange(len(images)).split(batch):
        x = images.batch(index)
        if sigma is None:
            logits = net(x)
        else:
            logits = net(x + sigma * torch.randn(x.shape, generator=generator), torch.tensor(sigma))
        right.append(logits.argmax(dim=1) == images.labels[index])
    right = torch.cat(right).double()
    per_class = {name: round(float(right[images.labels == i].mean()), 4) for i, name in enumerate(data.CLASSES)}
    return round(float(right.mean()), 4), per_class


def grid(images: Tensor, columns: int, path: Path, scale: int = 2) -> None:
    """Write images (N, 1, 28, 28) in [-1, 1] as one grey PNG, row by row, with a gap of two pixels."""
    rows = -(-len(images) // columns)
    canvas = torch.full((rows * 30 + 2, columns * 30 + 2), 255, dtype=torch.uint8)
    pixels = ((images[:, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    for i, image in enumerate(pixels):
        top, left = 2 + i // columns * 30, 2 + i % columns * 30
        canvas[top : top + 28, left : left + 28] = image
    picture = Image.fromarray(canvas.numpy())
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path, optimize=True)


def describe_file(path: Path) -> dict[str, object]:
    """Size, sha256 and metadata of a weights file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        **metadata,
    }


def evaluate(args: argparse.Namespace) -> dict[str, object]:
    """Everything the card says."""
    train, test = data.load_images("train", args.data), data.load_images("test", args.data)
    judge = load_classifier("judge", args.weights / "judge.safetensors")
    guide = load_classifier("guide", args.weights / "guide.safetensors")
    noisy = load_classifier("guide_noisy", args.weights / "guide_noisy.safetensors")
    encoder = load_spectral(args.weights / "spectral.safetensors")
    test_images = test.batch(slice(None))
    probabilities, features = metrics.judge_all(judge, test_images)

    net = load(args.weights / "unet.safetensors")
    images = sample(net, args.count, seed=args.seed, steps=args.steps, quiet=args.quiet or None)
    of_samples = metrics.describe(*metrics.judge_all(judge, images), metrics.moments(features))

    # Real images are judged like samples: `count` of them against the rest, for several disjoint draws.
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(args.seed))
    real = []
    for fold in order.split(args.count)[:FOLDS]:
        rest = torch.ones(len(test), dtype=torch.bool)
        rest[fold] = False
        real.append(metrics.describe(probabilities[fold], features[fold], metrics.moments(features[rest])))
    of_real = {
        k: v if k in ("count", "classes") else round(sum(r[k] for r in real) / len(real), 4) for k, v in real[0].items()
    }
    of_real["frechet_range"] = [min(r["frechet"] for r in real), max(r["frechet"] for r in real)]

    train_images = train.batch(slice(None))
    distance, index = metrics.nearest(images, train_images, quiet=args.quiet or None)
    of_samples["nearest_training_image"] = quantiles(distance)
    of_real["nearest_training_image"] = quantiles(
        metrics.nearest(test_images[order[: args.count]], train_images, quiet=args.quiet or None)[0]
    )
    grid(images[:100], 10, args.out / "samples.png")
    if args.neighbours:  # the samples nearest to a training image, each above that image
        closest = distance.argsort()[:10]
        grid(torch.cat([images[closest], train_images[index[closest]]]), 10, args.neighbours)

    judge_accuracy, judge_classes = accuracy(judge, test)
    guide_accuracy, guide_classes = accuracy(guide, test)
    return {
        "data": {
            "name": "Fashion-MNIST",
            "licence": "MIT, (c) 2017 Zalando SE",
            "train_sha256": train.checksum,
            "test_sha256": test.checksum,
        },
        "networks": {name: describe_file(args.weights / f"{name}.safetensors") for name in NETWORKS},
        "sampler": {
            "name": "Heun (Karras et al. 2022, algorithm 1, no churn)",
            "steps": args.steps,
            "network_calls": 2 * args.steps - 1,
            "schedule": "Karras, rho 7, sigma 80 to 0.01, then 0",
            "seed": args.seed,
        },
        "samples": of_samples,
        "real_test_images": of_real,
        "accuracy": {
            "judge": judge_accuracy,
            "judge_per_class": judge_classes,
            "guide": guide_accuracy,
            "guide_per_class": guide_classes,
            "guide_noisy": {str(sigma): accuracy(noisy, test, sigma)[0] for sigma in SIGMAS},
            "spectral": {str(sigma): accuracy(encoder, test, sigma)[0] for sigma in SIGMAS},
        },
    }


def quantiles(distance: Tensor) -> dict[str, float]:
    """Smallest, 1 % and median distance."""
    low, one, half = torch.quantile(distance, torch.tensor([0.0, 0.01, 0.5], dtype=torch.float64)).tolist()
    return {"min": round(low, 3), "percent_1": round(one, 3), "median": round(half, 3)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.evaluate", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--data", help="folder with the four idx files (default: $FASHION_MNIST, else the Debian package's)"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=HERE, help="where model_card.json, README.md and samples.png go")
    parser.add_argument("--count", type=int, default=1000, help="samples, and real images per draw (default 1000)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"Heun steps (default {STEPS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--neighbours", type=Path, help="also write a PNG of the ten samples nearest to a training image"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if args.count < 100 or args.steps < 2 or args.threads < 1:
        parser.error(
            "--count must be at least 100 (more than the 64 features), --steps at least 2, --threads at least 1"
        )
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        found = evaluate(args)
    except (data.DataError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (args.out / "model_card.json").write_text(json.dumps(found, indent=2) + "\n")
    (args.out / "README.md").write_text(card.render(found))
    print(json.dumps({k: found[k] for k in ("samples", "real_test_images", "accuracy")}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
