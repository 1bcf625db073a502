"""The model card, README.md, written from the figures in model_card.json."""

from __future__ import annotations

import json

from benchmarks.zoo.data import CLASSES, COUNT, DEBIAN_PACKAGE

INTRODUCTION = """\
# The zoo: five small networks trained on Fashion-MNIST

Real networks, small enough to be in the repository and to run on two cores, so that samplers, steering and guidance
can be tried and timed on more than random tensors. This page is written by `python -m benchmarks.zoo.evaluate`; the
same figures are in `model_card.json`.

![a hundred samples, not selected](samples.png)
"""

NETWORKS = """\
## The networks

| file | what it is | parameters | bytes | steps x batch, seed |
|---|---|---|---|---|
{rows}

All are stored as fp16 safetensors (the linear fit of spectral in fp32) and loaded into fp32. Each file's metadata holds the command, the settings and
the sha256 of the data it was trained from.

- **unet**: F(x, c_noise), unconditional, 1 x 28 x 28, EDM preconditioning with sigma_data 0.7 (Karras et al. 2022,
  table 1). Channels 32, 64, 128 at 28, 14, 7 pixels; one residual block per level, group normalisation scaled and
  shifted by the noise level; self-attention at 7 x 7 only; concatenated skips. `encode` runs `enc.0` to `enc.2`;
  `decode` runs `mid` and `dec.2` to `dec.0`. Trained on ln(sigma) ~ N(-0.6, 1.4^2), stratified within the batch;
  AdamW, constant learning rate with a warm-up and a linear decay to zero, bf16 autocast, moving average of the
  weights (what is stored). No augmentation: flipped shoes are not in the data.
- **unet_cond**: the same told a class, a copy of it trained on with the label dropped for a tenth of the images. For
  classifier-free guidance; label 10 stands for none.
- **guide**: five plain convolutions, clean images. For guidance that differentiates a classifier of the denoised
  estimate.
- **guide_noisy**: residual, told sigma, trained on x0 + sigma n with ln(sigma) ~ N(-0.2, 1.7^2) within 0.02 to 80.
  For guidance on the noisy sample.
- **spectral**: an encoder of noisy images, trained without labels so that its features tell what two noisings of one image
  share, and the linear fit of the classes to them. For spectral guidance.
- **judge**: residual, another architecture and seed, clean images. It never guides. Its 64 features carry the
  Frechet distance.
"""

USE = """\
## Use

```python
from benchmarks.zoo.unet import load, denoise
from benchmarks.zoo.classifiers import load_classifier

net = load()                                  # fp32, eval mode; load_conditional() for the one that takes labels
denoised = denoise(net, x, sigma)             # x (B, 1, 28, 28), sigma () or (B,)
raw = net(c_in * x, c_noise)                  # or the network alone, c_noise = ln(sigma) / 4
judge = load_classifier("judge")              # also "guide" and "guide_noisy"; benchmarks.zoo.spectral.load_spectral()
```
"""

HOW = """\
## Train and judge again

Fashion-MNIST comes from the Debian package `{package}` (`apt-get install {package}`) or from any folder with its
four idx files (`--data FOLDER`). Nothing is downloaded.

```
{commands}
python -m benchmarks.zoo.evaluate
```

On the CPU the two denoisers take about an hour; `--device cuda` trains on a GPU, with the same images, noise and order.

Training goes on from its last checkpoint (in `runs/`, every 250 steps) after Ctrl-C or a kill. The same seed,
torch, processor and number of threads give the same bits, interrupted or not; other machines give other bits and
figures close to these.
"""

LIMITS = """\
## Limits

- The Frechet distance is taken in the features of this zoo's own judge. It compares methods here; it is not the FID
  of other work, and the judge's idea of a class (it is right on {judge:.1%} of test images, on {shirt:.1%} of
  shirts) is part of it.
- The Frechet distance at {count} samples is biased upwards; real test images at the same count show by how much.
- The U-Net saw the training images {epochs:.1f} times. A longer run (`--steps`) is the first thing to try for better
  samples; until its learning rate decays, a run can be lengthened or shortened freely.
- Its conditional copy is judged where it is used, in the comparison of steering and guidance.
- The samples vary less than the data where the trace ratio is below that of real images, and fine print on shirts
  is blurred.
- The data is 28 x 28 grey pictures of clothes; nothing here says how a method does on larger images.
- The guides see the training images only. The noise-aware guide knows little above sigma 5, where little is left to
  know.
"""


def _row(name: str, file: dict) -> str:
    batch = json.loads(file["settings"])["batch"]
    what = {
        "unet": "denoiser",
        "unet_cond": "class-conditional denoiser",
        "guide": "classifier",
        "guide_noisy": "noise-aware classifier",
        "spectral": "noise-aware encoder",
        "judge": "classifier that judges",
    }
    return (
        f"| `weights/{file['file']}` | {what[name]} | {int(file['parameters']):,} | {file['bytes']:,} "
        f"| {int(file['steps']):,} x {batch}, {file['seed']} |"
    )


def _figures(found: dict) -> str:
    samples, real = found["samples"], found["real_test_images"]
    sampler = found["sampler"]
    low, high = real["frechet_range"]
    near = "nearest_training_image"

    def pair(label: str, key: str, digits: int = 3, extra: str = "") -> str:
        return f"| {label} | {samples[key]:.{digits}f} | {real[key]:.{digits}f}{extra} |"

    lines = [
        "## Figures",
        "",
        f"{samples['count']:,} samples, unguided, {sampler['name']}, {sampler['steps']} steps "
        f"({sampler['network_calls']} network calls), {sampler['schedule']}, seed {sampler['seed']}; "
        "beside them real test images at the same count "
        "(each draw against the rest of the test images, mean over disjoint draws).",
        "",
        "| | samples | real test images |",
        "|---|---|---|",
        pair("judge's confidence, mean", "confidence_mean"),
        pair("judge's confidence, median", "confidence_median"),
        pair("Frechet distance, 64 features", "frechet", 2, f" ({low:.2f} to {high:.2f})"),
        pair("trace of the feature covariance / that of the test images", "trace_ratio", 2),
    ]
    for key, label in (("min", "smallest"), ("percent_1", "1 % quantile"), ("median", "median")):
        lines.append(
            f"| distance to the nearest training image, {label} | {samples[near][key]:.2f} | {real[near][key]:.2f} |"
        )
    lines += [
        "",
        "Distances are Euclidean, pixels in [-1, 1]. A network that copied its training images would have "
        "distances far below those of real test images.",
        "",
        "| class (by the judge) | " + " | ".join(CLASSES) + " |",
        "|---" * (len(CLASSES) + 1) + "|",
        "| samples | " + " | ".join(str(samples["classes"][c]) for c in CLASSES) + " |",
        "| real test images, one draw | " + " | ".join(str(real["classes"][c]) for c in CLASSES) + " |",
        "",
    ]
    accuracy = found["accuracy"]
    lines += [
        "| accuracy on the 10,000 test images | all | " + " | ".join(CLASSES) + " |",
        "|---" * (len(CLASSES) + 2) + "|",
    ]
    for name in ("judge", "guide"):
        lines.append(
            f"| {name} | {accuracy[name]:.3f} | "
            + " | ".join(f"{accuracy[name + '_per_class'][c]:.3f}" for c in CLASSES)
            + " |"
        )
    noisy = accuracy["guide_noisy"]
    lines += [
        "",
        "| sigma | " + " | ".join(noisy) + " |",
        "|---" * (len(noisy) + 1) + "|",
        *(f"| {name}, accuracy | " + " | ".join(f"{v:.3f}" for v in accuracy[name].values()) + " |" for name in ("guide_noisy", "spectral")),
        "",
    ]
    return "\n".join(lines)


def render(found: dict) -> str:
    """The card as Markdown, from what `evaluate.evaluate` returns."""
    files = found["networks"]
    order = ("unet", "unet_cond", "guide", "guide_noisy", "spectral", "judge")
    licence = (
        "## Data and licence\n\n"
        f"Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747), {found['data']['licence']}. The 60,000 "
        f"training images (sha256 of pixels and labels `{found['data']['train_sha256'][:16]}...`) trained the "
        f"networks, the 10,000 test images (`{found['data']['test_sha256'][:16]}...`) judged "
        "them. The weights carry this repository's licence.\n"
    )
    return "\n".join(
        [
            INTRODUCTION,
            NETWORKS.format(rows="\n".join(_row(name, files[name]) for name in order)),
            _figures(found),
            USE,
            HOW.format(package=DEBIAN_PACKAGE, commands="\n".join(files[name]["command"] for name in order)),
            licence,
            LIMITS.format(
                judge=found["accuracy"]["judge"],
                shirt=found["accuracy"]["judge_per_class"]["Shirt"],
                count=found["samples"]["count"],
                epochs=int(files["unet"]["steps"]) * json.loads(files["unet"]["settings"])["batch"] / COUNT["train"],
            ),
        ]
    )
