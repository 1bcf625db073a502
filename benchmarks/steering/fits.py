"""What is found offline, once, before anything is drawn: each fit is kept in files, with what it took."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import fastdiff as fd
from benchmarks.steering.store import code_checksum, file_checksum
from benchmarks.zoo.unet import SIGMA_DATA
from fastdiff import steering
from fastdiff.steering.concept import Concept, fit_concepts

if TYPE_CHECKING:
    from benchmarks.steering.world import World

__all__ = ["ATTRIBUTES", "BLOCK", "DIRECTIONS", "Fits", "SIGMA", "STEERING_CODE", "attributes", "fit_name", "function_checksum"]

BLOCK, SIGMA = "enc.2", 1.0  # the last block of the encoder, and the level at which directions are learnt unless said otherwise
DIRECTIONS = {"mean difference": "mean_difference", "covariance-aware": "covariance_aware", "RFM": "rfm"}
LOWEST = 0.3  # sigma: the lowest end of a window that noise alignment is searched over
PER_CLASS = 100  # training images of each class that directions are learnt from
START = 1000  # the first of them; those before are what searches are judged against
ATTRIBUTES = ("bright", "large")
FIT_SEED = 30_000_000  # of the noise on image i, plus i
SHARE = 0.25  # of a class's images that count as bright, or large

STEERING_CODE = tuple(sorted((Path(fd.__file__).parent / "steering").glob("*.py")))


def fit_name(kind: str, block: str = BLOCK, sigma: float = SIGMA, of: str = "classes") -> str:
    return f"{kind} of {of}, {block}, sigma {sigma:g}"


@cache
def function_checksum(function: Callable) -> str:
    """Of what a function does: not of its comments and layout."""
    return hashlib.sha256(ast.dump(ast.parse(textwrap.dedent(inspect.getsource(function)))).encode()).hexdigest()[:16]


def attributes(images: Tensor) -> Tensor:
    """(N, 2): brightness, the mean of what is not background (above -0.8), and size, its share of the picture."""
    flat = images.flatten(1)
    front = flat > -0.8
    return torch.stack([(flat * front).sum(1) / front.sum(1).clamp_min(1), front.float().mean(1)], 1)


class Fits:
    """keep(spec, code, make): what `Run.unit` does; classes: those that are targets, all by default. Everything is fitted to
    training images, at its first use."""

    def __init__(self, world: World, keep: Callable, classes: Iterable[int] | None = None):
        self.world, self._keep, self.classes = world, keep, world.classes if classes is None else list(classes)
        self._folder = world.folder / "fits"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._here: dict[str, object] = {}

    def spec(self, name: str) -> dict:
        return {
            "what": "fit",
            "fit": name,
            "per_class": PER_CLASS,
            "start": START,
            "lowest": LOWEST,
            "share": SHARE,
            "classes": self.classes,
        }

    def cost(self, name: str) -> float | None:
        """Seconds that a fit took, for all classes together; None where it has not been made."""
        unit = self.world.store.get(self.spec(name), code_checksum(STEERING_CODE))
        return None if unit is None else unit.found["seconds"]

    def _fit(self, name: str, load: Callable[[Path], object], fit: Callable[[], object], save: Callable[[object, Path], None]):
        """One fit: from memory, from its files, or made now. load(folder), save(what was fitted, folder)."""
        if name in self._here:
            return self._here[name]
        spec, code, made = self.spec(name), code_checksum(STEERING_CODE), []
        where = self.world.store.path(spec)
        path = self._folder / where.stem  # a folder: some fits are several files

        def make():
            start = time.perf_counter()
            made.append(fit())
            seconds = time.perf_counter() - start
            path.mkdir(exist_ok=True)
            save(made[0], path)
            return {"seconds": seconds, "sha256": [file_checksum(f) for f in files_in(path)]}, {}

        unit = self._keep(spec, code, make)
        if not made and [file_checksum(f) for f in files_in(path)] != unit.found["sha256"]:
            where.unlink()  # files are gone, or others: fit again
            unit = self._keep(spec, code, make)
        self._here[name] = made[0] if made else load(path)
        return self._here[name]

    # ---- images

    def _by_class(self) -> dict[int, Tensor]:
        labels = self.world.train.labels
        return {c: self.world.train.batch(labels == c) for c in self.classes}

    def has(self, attribute: str, images: Tensor, labels: Tensor) -> Tensor:
        """(N,) bool: bright or large for its class, that is among the upper SHARE of the class's training images."""
        column = ATTRIBUTES.index(attribute)
        return attributes(images)[:, column] > self.limits[labels, column]

    @property
    def limits(self) -> Tensor:
        """(classes, 2): the attributes' quantile at 1 - SHARE of each class's training images."""
        if "limits" not in self._here:
            labels = self.world.train.labels
            each = [attributes(self.world.train.batch(labels == c)).quantile(1 - SHARE, dim=0) for c in self.world.classes]
            self._here["limits"] = torch.stack(each)
        return self._here["limits"]

    # ---- in pixels

    def latent(self) -> steering.LatentVector:
        """Mean of each class minus mean of all."""

        def fit():
            return steering.LatentVector.mean_difference(self._by_class(), self.world.train.batch(slice(None)))

        return self._fit("latent vector", _first(steering.LatentVector.load), fit, _as_one_file)

    def alignment(self) -> steering.NoiseAlignment:
        """Gaussians of each class and of all training images, good down to sigma LOWEST."""
        return self._alignment("noise alignment", self._by_class)

    def attribute_alignment(self) -> steering.NoiseAlignment:
        """The same for the images, of any class, that are bright or large for it."""
        images, labels = self.world.train.batch(slice(None)), self.world.train.labels
        return self._alignment(
            "noise alignment of attributes", lambda: {a: images[self.has(a, images, labels)] for a in ATTRIBUTES}
        )

    def joint_alignment(self, wanted: tuple[str, ...]) -> steering.NoiseAlignment:
        """The same for the images of each class that have all of these attributes."""

        def targets():
            found = {}
            for c, images in self._by_class().items():
                keep = torch.ones(len(images), dtype=torch.bool)
                for a in wanted:
                    keep &= self.has(a, images, torch.full((len(images),), c))
                found[c] = images[keep]
            return found

        return self._alignment(f"noise alignment of classes that are {' and '.join(wanted)}", targets)

    def _alignment(self, name: str, targets: Callable[[], dict]) -> steering.NoiseAlignment:
        def fit():
            return steering.NoiseAlignment.fit(targets(), self.world.train.batch(slice(None)), sigma=LOWEST)

        return self._fit(name, _first(steering.NoiseAlignment.load), fit, _as_one_file)

    # ---- in activations

    def concepts(self, kind: str, block: str = BLOCK, sigma: float = SIGMA) -> dict[int, Concept]:
        """The direction of each class, that class against the rest."""
        index = self.world.train_index(PER_CLASS, START)
        return self._concepts(kind, block, sigma, "classes", index, self.world.train.labels[index], self.classes)

    def attribute_concepts(self, kind: str, block: str = BLOCK, sigma: float = SIGMA) -> dict[str, Concept]:
        """The directions of attributes, learnt from as many images that have each as have it not, of all classes."""
        index = self.world.train_index(2 * PER_CLASS, START)
        images, labels = self.world.train.batch(index), self.world.train.labels[index]
        return self._concepts(
            kind, block, sigma, "attributes", index, {a: self.has(a, images, labels) for a in ATTRIBUTES}, ATTRIBUTES
        )

    def _concepts(self, kind, block, sigma, of, index, labels, names) -> dict:
        net, images = self.world.net, self.world.train.batch(index)

        def fit():
            found = fit_concepts(
                net,
                block,
                images,
                labels,
                sigma,
                DIRECTIONS[kind],
                classes=names,
                schedule="edm",
                prediction="edm",
                sigma_data=SIGMA_DATA,
                seeds=index + FIT_SEED,
                progress=False,
            )
            return [found[name] for name in names]

        def save(concepts, folder):
            for i, concept in enumerate(concepts):
                concept.save(folder / f"{i:02d}.safetensors")

        found = self._fit(fit_name(kind, block, sigma, of), lambda folder: [Concept.load(f) for f in files_in(folder)], fit, save)
        return dict(zip(names, found))


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _as_one_file(fitted, folder: Path) -> None:
    fitted.save(folder / "0.safetensors")


def _first(load: Callable) -> Callable[[Path], object]:
    return lambda folder: load(folder / "0.safetensors")
