"""Synthetic data in the real format, and one thread for tiny networks."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import checkout  # noqa: F401  isort: skip

from benchmarks.zoo import data


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    head = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim if magic is None else magic, *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write(folder: Path, count: int = 64, split: str = "train") -> Path:
    """A folder with `count` synthetic images, each class a bright square at its own place: something to learn."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, count)
    images = rng.integers(0, 40, (count, 28, 28))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 4)
        image[row * 9 : row * 9 + 7, column * 7 : column * 7 + 6] = 220
    folder.mkdir(parents=True, exist_ok=True)
    prefix = data.PREFIX[split]
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks gain nothing from more threads, and threads that wait for a core another program has lose much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "data")


@pytest.fixture(name="idx")
def idx_fixture():
    """The writer of idx files: idx(array, magic=None) -> bytes."""
    return idx
