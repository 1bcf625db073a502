"""Labelled images on disk: of class folders, of a table of attributes, or of one file; read when they are needed.

    a folder                     FOLDER/CLASS/*.png (jpg, jpeg, webp, bmp); a folder CLASS may be named A+B: its images have both
    a folder and a table         FOLDER/*.png, and a CSV or CelebA's own text: file names, and 1, 0 or -1 for each attribute
    .npz, .safetensors           images (N, H, W, C) or (N, C, H, W) uint8, labels (N,) int; and the classes' names, if any
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiff.noise import unknown

__all__ = ["Images", "open_images"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
NOT = "not "


@dataclass(frozen=True, eq=False)
class Images:
    """store: the pixels; groups: (N,) int64, the same for images with the same labels; members: for each class or attribute the
    groups that have it; exclusive: whether each image has one of them, as classes do."""

    store: Files | Array
    groups: Tensor
    members: dict[str, list[int]]
    exclusive: bool

    def __len__(self) -> int:
        return len(self.store)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.members)

    def has(self, target: str) -> Tensor:
        """(N,) bool: the images of a class, or with an attribute; of "not X", those without. Raises ``ValueError``."""
        name = target.removeprefix(NOT)
        if name not in self.members:
            raise ValueError(unknown("target", name, self.members))
        return torch.isin(self.groups, torch.tensor(self.members[name], dtype=torch.int64), invert=name != target)

    def all_of(self, targets: Sequence[str]) -> Tensor:
        """(n,) int64: the images that have all targets. Raises ``ValueError`` for fewer than two."""
        found = torch.stack([self.has(target) for target in targets]).all(0).nonzero().flatten()
        if len(found) < 2:
            raise ValueError(f"{len(found)} of {len(self)} images are {' and '.join(targets)}: 2 or more are taken")
        return found

    def batches(self, index: Tensor, size: int = 256) -> Iterator[Tensor]:
        """The images of index (n,) in [-1, 1], (b, C, H, W) float32, b at most ``size``."""
        for part in index.split(size):
            yield self.store.read(part.tolist()).float() / 127.5 - 1

    def read(self, index: Tensor) -> Tensor:
        """(n, C, H, W) float32 in [-1, 1]."""
        return torch.cat(list(self.batches(index)))

    def spread(self, index: Tensor, most: int | None) -> Tensor:
        """At most so many of index, evenly over all of it."""
        if most is None or len(index) <= most:
            return index
        return index[torch.arange(most) * len(index) // most]


# ---- pixels


@dataclass(frozen=True, eq=False)
class Array:
    """images: (N, C, H, W) uint8."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def check(self, index: Tensor) -> None:
        """All are of one size, which was looked at."""

    def read(self, index: list[int]) -> Tensor:
        return self.images[index]


@dataclass(frozen=True, eq=False)
class Files:
    """paths: of the images; shape: (C, H, W) that is wanted; crop: whether others are shrunk and cropped to it."""

    paths: list[Path]
    shape: tuple[int, int, int]
    crop: bool

    def __len__(self) -> int:
        return len(self.paths)

    def check(self, index: Tensor) -> None:
        """Looks at the headers of the files that will be read. Raises ``ValueError`` for another size, or no image."""
        from PIL import Image, UnidentifiedImageError

        _, height, width = self.shape
        for i in index.tolist():
            try:
                with Image.open(self.paths[i]) as image:
                    size = image.size
            except UnidentifiedImageError:
                raise ValueError(f"{self.paths[i]} is not a whole image") from None
            if size != (width, height) and not self.crop:
                raise ValueError(f"{self.paths[i]} is {size[0]} x {size[1]}, the network takes {width} x {height}: --crop "
                                 "shrinks and crops what has another size")

    def read(self, index: list[int]) -> Tensor:
        from PIL import Image

        channels, height, width = self.shape
        pixels = []
        for i in index:
            with Image.open(self.paths[i]) as image:
                image = image.convert("RGB" if channels == 3 else "L")
                image = image if image.size == (width, height) else cropped(image, width, height)
                pixels.append(torch.from_numpy(np.array(image)).view(height, width, channels))
        return torch.stack(pixels).permute(0, 3, 1, 2)


def cropped(image, width: int, height: int):
    """The middle of an image, shrunk as Dhariwal and Nichol 2021 did: by halves with a box filter, the rest bicubic."""
    from PIL import Image

    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


# ---- labels


def open_images(path: str | Path, shape: tuple[int, int, int], *, attributes: str | Path | None = None,
                crop: bool = False) -> Images:
    """Labelled images for a network that takes ``shape``. attributes: a table that names files of the folder.

    Raises ``ValueError`` or ``FileNotFoundError`` with what is there and what is taken. Pixels of folders are not read yet.
    """
    path = Path(path)
    if path.is_dir():
        return _with_table(path, Path(attributes), shape, crop) if attributes else _class_folders(path, shape, crop)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: a folder of images, or a file .npz or .safetensors, is taken")
    if attributes:
        raise ValueError(f"a table of attributes names files of a folder: {path} is a file")
    return _one_file(path, shape)


def _class_folders(path, shape, crop) -> Images:
    paths, groups, folders = [], [], []
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        inside = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        if inside:
            paths += inside
            groups += [len(folders)] * len(inside)
            folders.append(folder.name.split("+"))
    if not paths:
        raise ValueError(f"{path} has no images in folders: FOLDER/CLASS/*{', *'.join(SUFFIXES)} are taken, or with --attributes "
                         "a table of the images in it")
    names = sorted({name for folder in folders for name in folder})
    members = {name: [i for i, folder in enumerate(folders) if name in folder] for name in names}
    return Images(Files(paths, shape, crop), torch.tensor(groups), members, max(map(len, folders)) == 1)


def _with_table(path, table, shape, crop) -> Images:
    names, rows = _rows(table)
    missing = [file for file, _ in rows if not (path / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{table} names {len(rows)} files, of which {len(missing)} are not in {path}: {missing[0]}")
    kinds, groups = torch.tensor([[value > 0 for value in row] for _, row in rows]).unique(dim=0, return_inverse=True)
    members = {name: kinds[:, i].nonzero().flatten().tolist() for i, name in enumerate(names)}
    return Images(Files([path / file for file, _ in rows], shape, crop), groups, members, False)


def _rows(table: Path) -> tuple[list[str], list[tuple[str, list[float]]]]:
    """Attributes, and for each file their values. CelebA's text has the number of files before the header, and no comma."""
    if not table.is_file():
        raise FileNotFoundError(f"{table} is not there: a table of attributes is taken")
    lines = [line for line in table.read_text().splitlines() if line.strip()]
    if lines and lines[0].strip().isdigit():
        lines = lines[1:]
    if len(lines) < 2:
        raise ValueError(f"{table} has no rows: a header with the attributes, and a row for each file, are taken")
    rows = list(csv.reader(lines, skipinitialspace=True)) if "," in lines[0] else [line.split() for line in lines]
    header, rows = rows[0], rows[1:]
    header = header if len(rows[0]) == len(header) + 1 else header[1:]  # CelebA's header does not name the files' column
    found = []
    for row in rows:
        try:
            if len(row) != len(header) + 1:
                raise ValueError
            found.append((row[0], [float(value) for value in row[1:]]))
        except ValueError:
            raise ValueError(f"{table}: the row of {row[0]} has not one number for each of {len(header)} attributes") from None
    return header, found


def _one_file(path, shape) -> Images:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        names = arrays.get("classes")
    elif path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            names = json.loads((file.metadata() or {}).get("classes", "null"))
    else:
        raise ValueError(f"{path}: a folder of images, or a file .npz or .safetensors, is taken")
    if not {"images", "labels"} <= set(arrays):
        raise ValueError(f"{path} holds {', '.join(arrays) or 'nothing'}: images and labels are taken")
    pixels, labels = arrays["images"], arrays["labels"]
    channels, height, width = shape
    if pixels.dtype != np.uint8 or pixels.shape[1:] not in ((height, width, channels), shape):
        raise ValueError(f"{path}: images are {pixels.dtype} {pixels.shape}: uint8 (N, {height}, {width}, {channels}) or "
                         f"{('N', *shape)} is taken".replace("'N'", "N"))
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise ValueError(f"{path}: labels are {labels.dtype} {labels.shape}: ({len(pixels)},) ints of 0 or more are taken")
    images = torch.from_numpy(pixels)
    images = images if pixels.shape[1:] == shape else images.permute(0, 3, 1, 2).contiguous()
    names = [str(i) for i in range(int(labels.max()) + 1)] if names is None else [str(name) for name in names]
    if labels.max() >= len(names):
        raise ValueError(f"{path}: label {labels.max()} for {len(names)} classes")
    return Images(Array(images), torch.from_numpy(labels.astype(np.int64)), {name: [i] for i, name in enumerate(names)}, True)
