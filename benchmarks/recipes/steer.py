"""From settings to what acts: fits of noise alignment and concepts, guidance by classifiers, and the plan they act on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fastdiff as fd
from fastdiff import guidance, steering
from fastdiff.cli import Refused, load_model
from fastdiff.steering.collect import find_block
from fastdiff.steering.window import rows_in

from .checkpoints import Checkpoint
from .images import NOT, Images

__all__ = ["Classifier", "Fits", "block_of", "check", "fit", "guide", "make_plan", "opened", "share_right"]

VALUES = (-1.0, 1.0)  # of the images
ALIGNED, CONCEPTS = ("na", "na-rfm"), ("rfm", "na-rfm")


def make_plan(checkpoint: Checkpoint, s: dict) -> fd.Plan:
    """The plan of the settings: sampler, steps, its options, and the checkpoint's schedule, prediction and time grid."""
    options = {name: s[name] for name in ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise") if s.get(name) is not None}
    clip = VALUES if s["clip"] else None
    return fd.plan(s["sampler"], steps=s["steps"], clip_denoised=clip, **checkpoint.how, **checkpoint.grid, **options)


def check(checkpoint: Checkpoint, plan: fd.Plan, s: dict) -> None:
    """Raises ``ValueError`` for windows that no call of the network falls into, and for a block that is not there."""
    if "window" in s or "window_steps" in s:
        rows_in(plan, s.get("window"), s.get("window_steps"))
    if "concept_window" in s:
        rows_in(plan, s["concept_window"])
        block_of(checkpoint, s)


def block_of(checkpoint: Checkpoint, s: dict) -> str:
    """The block's name inside of the network. Raises ``ValueError`` with the nearest names."""
    block = s["block"] or checkpoint.block
    find_block(checkpoint.model.network, block)
    return block


# ---- steering


@dataclass
class Fits:
    """What was fitted, or loaded. concepts: by target."""

    alignment: steering.NoiseAlignment | None = None
    latent: steering.LatentVector | None = None
    concepts: dict[str, steering.Concept] | None = None

    def _files(self) -> dict:
        files = {f"concept-{i}.safetensors": concept for i, concept in enumerate((self.concepts or {}).values())}
        files |= {"alignment.safetensors": self.alignment, "latent.safetensors": self.latent}
        return {name: fitted for name, fitted in files.items() if fitted}

    def actions(self, s: dict) -> list:
        """For `fd.sample`. Concepts first: they evaluate the network twice, and the others are then added once."""
        window = {"window": s.get("window"), "steps": s.get("window_steps")}
        concepts = (self.concepts or {}).values()
        acting = [c.at(s["concept_weight"], s["concept_scale"], s["concept_window"]) for c in concepts]
        return acting + [fitted.at(s["weight"], **window) for fitted in (self.alignment, self.latent) if fitted]

    def described(self) -> list[str]:
        return [repr(fitted) for fitted in self._files().values()]

    def save(self, folder: Path) -> list[Path]:
        """Writes each as safetensors: `Fits.load` reads them."""
        for name, fitted in self._files().items():
            fitted.save(folder / name)
        return [folder / name for name in self._files()]

    @classmethod
    def load(cls, folder: Path, checkpoint: Checkpoint, method: str, targets: Sequence[str]) -> Fits:
        """What an earlier run wrote. Raises ``ValueError`` or ``OSError`` where it is not of this network or these targets."""
        fits, name = cls(), " and ".join(targets)
        if method in ALIGNED:
            fits.alignment = steering.NoiseAlignment.load(folder / "alignment.safetensors", shape=checkpoint.shape)
            _same(folder, "alignment", tuple(fits.alignment.targets), name)
        if method == "latent":
            fits.latent = steering.LatentVector.load(folder / "latent.safetensors", shape=checkpoint.shape)
            _same(folder, "latent", fits.latent.names, name)
        if method in CONCEPTS:
            fits.concepts = {}
            for i, target in enumerate(targets):
                concept = fits.concepts[target] = steering.Concept.load(folder / f"concept-{i}.safetensors")
                _same(folder, f"concept-{i}", (str(concept.label),), target)
                concept.check(checkpoint.model)
        return fits


def _same(folder, what, names, wanted) -> None:
    if names != (wanted,):
        raise ValueError(f"{folder / what}.safetensors is of {', '.join(names)}: {wanted} is wanted")


def fit(checkpoint: Checkpoint, images: Images, targets: Sequence[str], method: str, s: dict, *, seed: int = 0) -> Fits:
    """What the method needs, of the images: noise alignment of those that have all targets, a concept for each target."""
    fits, name, index = Fits(), " and ".join(targets), images.all_of(targets)
    everything, learnt = torch.arange(len(images)), {}
    if method in (*ALIGNED, "latent"):
        everything = images.spread(everything, s["limit"])
        images.store.check(torch.cat([index, everything]))
    if method in CONCEPTS:
        learnt = {target: _halves(images, target, s["concept_images"]) for target in targets}
        images.store.check(torch.cat(list(learnt.values())))
    if method in ALIGNED:  # sigma 0 keeps every direction: a run takes those that act in its window
        fits.alignment = steering.NoiseAlignment.fit({name: images.batches(index)}, images.batches(everything), sigma=0.0,
                                                     rank=s["rank"])
    if method == "latent":
        fits.latent = steering.LatentVector.mean_difference({name: images.batches(index)}, images.batches(everything))
    if method in CONCEPTS:
        fits.concepts = {}
    for target, which in learnt.items():
        options = {"iterations": s["iterations"]} if s["direction"] == "rfm" else {}
        found = steering.fit_concepts(
            checkpoint.model, f"network.{block_of(checkpoint, s)}", images.read(which), {target: images.has(target)[which]},
            s["learnt_at"], s["direction"], seeds=seed, batch_size=s["batch_size"], **checkpoint.how, **options)
        fits.concepts[target] = found[target]
    return fits


def _halves(images: Images, target: str, count: int) -> Tensor:
    """Half of them with the target, half without, as far as there are, evenly drawn."""
    has = images.has(target)
    return torch.cat([images.spread(side.nonzero().flatten(), count // 2) for side in (has, ~has)])


# ---- guidance


@dataclass(frozen=True)
class Classifier:
    """network: logits (n, classes) of x (n, C, H, W), and of sigma (n,) where it knows noise; label: the class that is wanted."""

    network: Callable[..., Tensor]
    classes: int
    label: int


class LogProb:
    """log p(y | x) of several classifiers at once, their sum. y: (B, T), a label for each."""

    def __init__(self, classifiers: Sequence[Classifier]):
        self.parts = [guidance.labels(c.network, c.classes) for c in classifiers]

    def __call__(self, x: Tensor, *rest: Tensor) -> Tensor:
        *noise, y = rest
        return sum(part(x, *noise, y[:, i]) for i, part in enumerate(self.parts))


def guide(method: str, classifiers: Sequence[Classifier], count: int, s: dict):
    """The action of a method of guidance, for ``count`` samples of the same targets."""
    log_prob = LogProb(classifiers)
    y = torch.tensor([[c.label for c in classifiers]]).expand(count, -1)
    if method == "cg":
        return guidance.classifier(log_prob, y, s["strength"])
    if method == "tfg":
        return guidance.tfg(log_prob, y, s["rho"], s["mu"], s["sigma_bar"], s["n_iter"], s["n_mc"], s["recurrences"])
    names = {"n_mc": "n", "n_iter": "backward_steps", "recurrences": "n_recur"}
    more = {names[name]: value for name, value in s.items() if name in names}
    return getattr(guidance, method)(log_prob, y, s["strength"], **more)


def opened(specs: Sequence[str], option: str, images: Images, targets: Sequence[str], labels: Sequence[int] | None,
           device: torch.device, shape: tuple[int, int, int], noisy: bool = False) -> list[Classifier]:
    """For each target a classifier, asked once for the logits of a grey image.

    specs: FILE.py:NAME, a function that returns what is called as network(x), or network(x, sigma) where it is ``noisy``: one for
    all targets, or one each. labels: None: of classes their place among all, of attributes 1, and 0 for "not X". Raises
    ``ValueError`` or ``Refused`` for what does not fit.
    """
    if len(specs) not in (1, len(targets)):
        raise ValueError(f"{len(specs)} of {option} and {len(targets)} targets: one, or one for each target, is taken")
    if labels is not None and len(labels) != len(targets):
        raise ValueError(f"{len(labels)} of --label and {len(targets)} targets: one for each target is taken")
    found = []
    for i, target in enumerate(targets):
        network = _loaded(specs[min(i, len(specs) - 1)], option, device)
        x = torch.zeros(1, *shape, device=device)
        with torch.no_grad():
            logits = network(x, torch.ones(1, device=device)) if noisy else network(x)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
            returned = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"{option} returned {returned} for one image: logits (1, classes) are taken")
        classes, expected = logits.shape[1], len(images.classes) if images.exclusive else 2
        if labels is None and classes != expected:
            raise ValueError(f"{option} has {classes} classes, the images have {expected} for {target!r}: --label says which of "
                             "its classes the target is")
        label = _label(images, target) if labels is None else labels[i]
        if not 0 <= label < classes:
            raise ValueError(f"--label is {label}, and {option} has {classes} classes")
        found.append(Classifier(network, classes, label))
    return found


def _loaded(spec: str, option: str, device) -> Callable:
    try:
        network = load_model(spec)
    except Refused as error:
        raise Refused(str(error).replace("--model", option)) from None
    if not callable(network):
        raise Refused(f"{option}: {spec} returned {type(network).__name__}: something that can be called for logits is taken")
    return network.to(device).eval().requires_grad_(False) if isinstance(network, nn.Module) else network


def _label(images: Images, target: str) -> int:
    if images.exclusive and target.startswith(NOT):
        raise ValueError(f"{target!r} is no class of a classifier's: a class is taken, or --label")
    return images.classes.index(target) if images.exclusive else int(not target.startswith(NOT))


def share_right(judges: Sequence[Classifier], samples: Tensor, batch_size: int) -> float:
    """The share of samples that each of the classifiers takes for its target."""
    right = []
    with torch.no_grad():
        for x in samples.clamp(*VALUES).split(batch_size):
            right.append(torch.stack([judge.network(x).argmax(1) == judge.label for judge in judges]).all(0))
    return float(torch.cat(right).float().mean())
