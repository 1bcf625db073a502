"""The encoder of Spectral Guidance: how it is trained, fitted and stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.zoo import data, spectral, train
from benchmarks.zoo.evaluate import accuracy
from benchmarks.zoo.trainer import Trainer
from fastdiff.guidance import Spectral

COUNT = 300
LEVELS = (0.3, 3.0)
FIT = ("levels", "mean", "whitening", "coefficients", "prior")


@pytest.fixture
def folder(tmp_path: Path, idx, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of ten classes, each a bright square at its own place, in files of the real format."""
    rng = np.random.default_rng(0)
    labels = np.arange(COUNT) % 10
    images = rng.integers(0, 40, (COUNT, 28, 28))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 4)
        image[row * 9 : row * 9 + 7, column * 7 : column * 7 + 6] = 220
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    monkeypatch.setitem(data.COUNT, "train", COUNT)
    monkeypatch.setattr(spectral, "FIT_LEVELS", LEVELS)
    return tmp_path


def command(folder: Path, *more: str) -> int:
    folders = ["--data", str(folder), "--runs", str(folder / "runs"), "--out", str(folder / "weights")]
    return train.main(["spectral", "--steps", "3", "--batch", "150", "--threads", "1", "--quiet", *folders, *more])


def test_the_command_trains_fits_and_stores(folder: Path) -> None:
    assert command(folder) == 0
    path = folder / "weights" / "spectral.safetensors"
    with safe_open(path, "pt") as file:
        metadata, kinds = file.metadata(), {name: file.get_tensor(name).dtype for name in file.keys()}
    assert metadata["command"] == "python -m benchmarks.zoo.train spectral --steps 3 --batch 150"
    assert metadata["data_sha256"] == data.load_images("train", folder).checksum
    assert all(kinds.pop(name) == torch.float32 for name in FIT) and set(kinds.values()) == {torch.float16}

    network = spectral.load_spectral(path)
    assert sum(p.numel() for p in network.encoder.parameters()) == int(metadata["parameters"]) and not network.training
    images = data.load_images("train", folder)
    labels = torch.nn.functional.one_hot(images.labels, 10).float()
    again = Spectral.fit(network.encoder, images.batch(slice(None)), labels, LEVELS)  # the fit is of what was stored
    assert all(torch.equal(getattr(again, name), getattr(network, name)) for name in FIT)
    assert accuracy(network, images, 0.3)[0] > 0.9  # squares are told apart by features of three steps


def test_resumed_equals_uninterrupted_in_every_bit(folder: Path) -> None:
    assert command(folder) == 0
    whole = load_file(folder / "weights" / "spectral.safetensors")
    (folder / "runs" / "spectral.safetensors").unlink()
    assert command(folder, "--until", "2") == 130 and command(folder) == 0
    parts = load_file(folder / "weights" / "spectral.safetensors")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)


def test_the_loss_sees_one_level_a_step_and_two_noisings_of_each_image(folder: Path) -> None:
    images, seen = data.load_images("train", folder), []
    net, loss = train.build("spectral", images, 0, folder)

    def watched(x, sigma):
        seen.append((x, sigma.item(), torch.is_grad_enabled()))
        return net(x, sigma)

    watched.parameters = net.parameters
    index = torch.arange(200)
    for step in range(2):
        loss(watched, index, torch.Generator().manual_seed(step))
    (a, sigma, first), (b, same, second), (_, other, _), _ = seen
    assert sigma == same != other and (first, second) == (False, True)
    clean = images.batch(index)
    noise = torch.stack([(a - clean) / sigma, (b - clean) / sigma])
    assert abs(noise.std() - 1) < 0.01 and abs((noise[0] * noise[1]).mean()) < 0.01


def test_the_loss_falls(folder: Path) -> None:
    images = data.load_images("train", folder)
    settings = train.dataclasses.replace(train.DEFAULTS["spectral"], steps=6, batch=200, warmup=1)
    net, loss = train.build("spectral", images, 0, folder)
    index = torch.arange(200)

    def at_one_level() -> float:
        with torch.no_grad():
            return loss(net, index, torch.Generator().manual_seed(3)).item()

    before = at_one_level()
    Trainer(net, loss, len(images), settings, folder / "run.safetensors", images.checksum).run(quiet=True)
    assert at_one_level() < 0.9 * before


def test_images_of_another_size() -> None:
    encoder = spectral.SpectralEncoder(features=5, size=12)
    assert encoder(torch.zeros(3, 1, 12, 12), torch.tensor(2.0)).shape == (3, 5)


def test_the_committed_encoder_knows_the_class() -> None:
    """What it was trained from, and what it says of test images, far above the tenth of a guess."""
    path = spectral.WEIGHTS / "spectral.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    card = json.loads((spectral.WEIGHTS.parent / "model_card.json").read_text())
    assert metadata["data_sha256"] == card["data"]["train_sha256"] and metadata["as_if_uninterrupted"] == "true"
    assert metadata["command"].startswith("python -m benchmarks.zoo.train spectral")
    try:
        images = data.load_images("test")
    except data.DataError as error:
        pytest.skip(f"no test images: {error}")
    images = data.Images(images.pixels[:1000], images.labels[:1000], images.checksum)
    network = spectral.load_spectral()
    assert accuracy(network, images, 1.0)[0] > 0.7 and accuracy(network, images, 5.0)[0] > 0.42
