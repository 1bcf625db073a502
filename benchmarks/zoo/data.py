"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747; MIT licence) from the four idx files, compressed or not.

Nothing is downloaded here. The files come from a folder, or from the Debian package `dataset-fashion-mnist`, which
puts them where `DEBIAN_FOLDER` says. The idx format: big-endian; magic number (two zero bytes, type 8 = unsigned byte,
number of dimensions), one 32-bit size per dimension, then the bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
PREFIX = {"train": "train", "test": "t10k"}
COUNT = {"train": 60_000, "test": 10_000}
HOW = (
    f"Install the Debian package ({DEBIAN_PACKAGE}: `apt-get install {DEBIAN_PACKAGE}`, files in {DEBIAN_FOLDER}), "
    "or put the four files {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz] from "
    "https://github.com/zalandoresearch/fashion-mnist into a folder and name it "
    "(--data FOLDER, or the environment variable FASHION_MNIST)."
)


class DataError(Exception):
    """Missing data, or not what it should be; the message says which file, what was found, what was expected."""


@dataclass(frozen=True)
class Images:
    """One half of the data: `pixels` uint8 (N, 1, 28, 28), `labels` int64 (N,), `checksum` sha256 of their bytes."""

    pixels: Tensor
    labels: Tensor
    checksum: str

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor | slice) -> Tensor:
        """The chosen images, float32 (n, 1, 28, 28) in [-1, 1]: pixel / 127.5 - 1."""
        return scale(self.pixels[index])


def scale(pixels: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read one idx file of unsigned bytes with the given number of dimensions. `path` may end in .gz."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as {'gzip' if path.suffix == '.gz' else 'a file'}: {error}") from error
    head = 4 + 4 * dimensions
    if len(raw) < head:
        raise DataError(f"{path}: {len(raw)} bytes, too short for an idx header of {head} bytes")
    magic = struct.unpack(">I", raw[:4])[0]
    expected = 0x0800 | dimensions
    if magic != expected:
        raise DataError(
            f"{path}: magic number 0x{magic:08x}, expected 0x{expected:08x} "
            f"(idx, unsigned bytes, {dimensions} dimensions)"
        )
    shape = struct.unpack(f">{dimensions}I", raw[4:head])
    size = int(np.prod(shape, dtype=np.int64))
    if len(raw) - head != size:
        raise DataError(
            f"{path}: the header says {shape}, which is {size} bytes of data; the file has {len(raw) - head}"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=head).reshape(shape).copy()


def find_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder with the files: the one given, else $FASHION_MNIST, else the Debian package's."""
    chosen = folder or os.environ.get("FASHION_MNIST")
    path = Path(chosen) if chosen else DEBIAN_FOLDER
    if not path.is_dir():
        raise DataError(f"no Fashion-MNIST: the folder {path} does not exist. {HOW}")
    return path


def find_file(folder: Path, name: str) -> Path:
    """`name` or `name.gz` in `folder`."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise DataError(f"no Fashion-MNIST: {folder} holds neither {name}.gz nor {name}. {HOW}")


def load_images(split: str, folder: str | os.PathLike[str] | None = None, *, count: int | None = None) -> Images:
    """Load "train" (60,000) or "test" (10,000).

    `count`: how many images the files must hold; the real data's number unless given (tests give their own).
    """
    if split not in PREFIX:
        raise ValueError(f"split is {split!r}, must be one of {sorted(PREFIX)}")
    count = COUNT[split] if count is None else count
    root = find_folder(folder)
    image_file = find_file(root, f"{PREFIX[split]}-images-idx3-ubyte")
    label_file = find_file(root, f"{PREFIX[split]}-labels-idx1-ubyte")
    pixels, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if pixels.shape != (count, 28, 28):
        raise DataError(f"{image_file}: images of shape {pixels.shape}, expected ({count}, 28, 28)")
    if labels.shape != (count,):
        raise DataError(f"{label_file}: {labels.shape[0]} labels, expected {count}")
    if labels.max() >= len(CLASSES):
        raise DataError(f"{label_file}: label {labels.max()}, expected 0 to {len(CLASSES) - 1}")
    checksum = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    return Images(torch.from_numpy(pixels)[:, None], torch.from_numpy(labels).long(), checksum)
