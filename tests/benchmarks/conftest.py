"""A world in which every method runs quickly: the real classes of networks, small and untrained, on made-up images."""

from __future__ import annotations

import pytest
import torch

import checkout  # noqa: F401  isort: skip

from benchmarks.steering import fits
from benchmarks.steering.world import Sampler, World
from benchmarks.zoo.classifiers import CLASSIFIERS
from benchmarks.zoo.data import Images
from benchmarks.zoo.spectral import SpectralEncoder
from benchmarks.zoo.unet import ConditionalUNet, UNet
from fastdiff.guidance import Spectral

SIZE = 12  # of the images: the networks take any multiple of 4
SMALL = {"channels": (8, 16, 32), "emb": 16}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """A network's last bits depend on the number of threads: what a module's fixtures drew is compared with what its tests draw."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(each: int, seed: int) -> Images:
    """Each class a bright square at its own place, of varying brightness and size, on noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(10).repeat(each)
    pixels = torch.randint(0, 40, (len(labels), 1, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    for image, label in zip(pixels, labels.tolist()):
        row, column = divmod(label, 4)
        size, value = torch.randint(2, 5, (), generator=generator), torch.randint(120, 256, (), generator=generator)
        image[0, row * 4 : row * 4 + size, column * 3 : column * 3 + size] = value
    return Images(pixels, labels, f"made up, seed {seed}")


def network(kind, seed, **options):
    torch.manual_seed(seed)
    net = kind(**options)
    for p in net.parameters():
        if p.ndim > 1 and not p.any():  # last layers start at zero, which nothing could steer
            torch.nn.init.normal_(p, std=0.1)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def networks():
    found = {name: network(kind, i) for i, (name, kind) in enumerate(CLASSIFIERS.items())}
    some = images(30, 2)
    encoder = network(SpectralEncoder, 9, features=8, emb=16, size=SIZE)
    found["spectral"] = Spectral.fit(encoder, some.batch(slice(None)), torch.eye(10)[some.labels], (0.1, 1.0, 10.0))
    return {"unet": network(UNet, 7, **SMALL), "unet_cond": network(ConditionalUNet, 8, **SMALL), **found}


@pytest.fixture(scope="session")
def data():
    return images(30, 0), images(20, 1)


@pytest.fixture
def make_world(networks, data, tmp_path, monkeypatch):
    """make_world(folder name, **changes): a World in a folder of its own."""
    monkeypatch.setattr(fits, "PER_CLASS", 12)
    monkeypatch.setattr(fits, "START", 10)

    def make(name="work", without=(), **changes):
        chosen = {k: v for k, v in networks.items() if k not in without}
        options = {
            "sampler": Sampler(steps=6, batch=4),
            "context": {"networks": "small", "sampler": vars(Sampler(steps=6, batch=4))},
            "folder": tmp_path / name,
            "reference_count": 20,
            "real_count": 8,
        }
        return World(chosen, *data, **{**options, **changes})

    return make
