"""The zoo: data files, the U-Net's contract, and the committed weights."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.zoo import card, data, evaluate
from benchmarks.zoo.classifiers import CLASSIFIERS, load_classifier
from benchmarks.zoo.spectral import load_spectral
from benchmarks.zoo.trainer import save
from benchmarks.zoo.unet import IMAGE_SHAPE, WEIGHTS, UNet, denoise, load, load_conditional, preconditioning

ZOO = Path(__file__).parents[2] / "benchmarks" / "zoo"

# data


def test_images_are_read_and_scaled(folder: Path) -> None:
    images = data.load_images("train", folder, count=64)
    assert images.pixels.shape == (64, 1, 28, 28) and images.pixels.dtype == torch.uint8
    batch = images.batch(torch.tensor([3, 5]))
    assert batch.shape == (2, 1, 28, 28) and batch.dtype == torch.float32
    assert torch.equal(batch, images.pixels[[3, 5]].float() / 127.5 - 1)
    assert data.scale(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
    assert len(images.checksum) == 64


def break_magic(folder: Path, idx) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(64), magic=0x0D01))


def break_length(folder: Path, idx) -> None:
    path = folder / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def break_head(folder: Path, idx) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08")


def break_gzip(folder: Path, idx) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-30])


def break_gzip_head(folder: Path, idx) -> None:
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"<html>not found</html>")


def break_shape(folder: Path, idx) -> None:
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((64, 32, 32)))))


def break_count(folder: Path, idx) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(63)))


def break_label(folder: Path, idx) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.full(64, 10)))


def remove_labels(folder: Path, idx) -> None:
    (folder / "train-labels-idx1-ubyte").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (break_magic, "train-labels-idx1-ubyte: magic number 0x00000d01, expected 0x00000801"),
        (break_length, r"header says \(64,\), which is 64 bytes of data; the file has 63"),
        (break_head, "3 bytes, too short for an idx header of 8"),
        (break_gzip, "train-images-idx3-ubyte.gz: cannot be read as gzip"),
        (break_gzip_head, "train-images-idx3-ubyte.gz: cannot be read as gzip"),
        (break_shape, r"images of shape \(64, 32, 32\), expected \(64, 28, 28\)"),
        (break_count, "63 labels, expected 64"),
        (break_label, "label 10, expected 0 to 9"),
        (
            remove_labels,
            "neither train-labels-idx1-ubyte.gz nor train-labels-idx1-ubyte.*apt-get install dataset-fashion-mnist",
        ),
    ],
)
def test_bad_files_are_named(folder: Path, idx, damage, said: str) -> None:
    damage(folder, idx)
    with pytest.raises(data.DataError, match=said):
        data.load_images("train", folder, count=64)


def test_missing_folder_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(data.DataError, match="nowhere does not exist.*apt-get install dataset-fashion-mnist"):
        data.load_images("train", tmp_path / "nowhere")
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "elsewhere"))
    with pytest.raises(data.DataError, match="elsewhere does not exist"):
        data.load_images("test")
    with pytest.raises(ValueError, match="split is 'valid'"):
        data.load_images("valid", tmp_path)


def test_real_count_is_checked(folder: Path) -> None:
    with pytest.raises(data.DataError, match=r"\(64, 28, 28\), expected \(60000, 28, 28\)"):
        data.load_images("train", folder)


# the U-Net


@pytest.fixture(scope="module")
def net() -> UNet:
    """A U-Net whose zero-initialised layers are filled, so that every part of it shows in the output."""
    torch.manual_seed(0)
    net = UNet().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return net.requires_grad_(False)


def test_unet_shapes_and_names(net: UNet) -> None:
    x = torch.randn(3, *IMAGE_SHAPE)
    assert net(x, torch.tensor([-1.0, 0.0, 1.0])).shape == x.shape
    assert torch.equal(net(x, torch.tensor(0.3)), net(x, torch.full((3,), 0.3)))
    assert (net.sigma_data, net.image_shape) == (0.7, (1, 28, 28))
    names = dict(net.named_modules())
    assert {"enc.0", "enc.1", "enc.2", "mid", "dec.2", "dec.1", "dec.0"} <= names.keys()
    assert net(torch.randn(0, *IMAGE_SHAPE), torch.zeros(0)).shape == (0, 1, 28, 28)


def test_encode_then_decode_is_forward(net: UNet) -> None:
    x, c_noise = torch.randn(2, *IMAGE_SHAPE), torch.tensor([-0.5, 0.5])
    h, skips, emb = net.encode(x, c_noise)
    assert [tuple(s.shape[1:]) for s in skips] == [(32, 28, 28), (64, 14, 14), (128, 7, 7)]
    assert h is skips[-1]
    kept = [s.clone() for s in skips]
    first = net.decode(h, skips, emb)
    assert torch.equal(first, net(x, c_noise))
    assert torch.equal(first, net.decode(h, skips, emb))  # the rest can be run twice from one encoder pass
    assert len(skips) == 3 and all(map(torch.equal, kept, skips))
    edited = net.decode(h + 0.1, [*skips[:2], h + 0.1], emb)
    assert not torch.equal(edited, first)


def test_hook_on_the_last_encoder_block_edits_the_output(net: UNet) -> None:
    x, c_noise = torch.randn(2, *IMAGE_SHAPE), torch.tensor([-0.5, 0.5])
    h, skips, emb = net.encode(x, c_noise)
    handle = net.enc[2].register_forward_hook(lambda module, args, out: out + 0.1)
    try:
        hooked = net(x, c_noise)
    finally:
        handle.remove()
    assert torch.equal(hooked, net.decode(h + 0.1, [*skips[:2], h + 0.1], emb))


def test_samples_do_not_mix(net: UNet) -> None:
    x, c_noise = torch.randn(4, *IMAGE_SHAPE), torch.linspace(-1, 1, 4)
    torch.testing.assert_close(net(x, c_noise)[2:3], net(x[2:3], c_noise[2:3]), rtol=1e-4, atol=1e-5)


def test_preconditioning_is_table_1() -> None:
    sigma = torch.tensor([0.01, 0.7, 80.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = preconditioning(sigma)
    for i, s in enumerate(sigma.tolist()):
        assert c_skip[i].item() == pytest.approx(0.49 / (s * s + 0.49))
        assert c_out[i].item() == pytest.approx(s * 0.7 / math.sqrt(s * s + 0.49))
        assert c_in[i].item() == pytest.approx(1 / math.sqrt(s * s + 0.49))
        assert c_noise[i].item() == pytest.approx(math.log(s) / 4)
    # what the table is made for: unit variance of the network's input and of its target, for data of that variance
    torch.testing.assert_close(c_in**2 * (0.49 + sigma**2), torch.ones(3, dtype=torch.float64))
    target = ((1 - c_skip) ** 2 * 0.49 + c_skip**2 * sigma**2) / c_out**2
    torch.testing.assert_close(target, torch.ones(3, dtype=torch.float64))


def test_denoise(net: UNet) -> None:
    x, sigma = torch.randn(2, *IMAGE_SHAPE), torch.tensor([0.5, 3.0])
    c_skip, c_out, c_in, c_noise = (c.view(-1, 1, 1, 1) for c in preconditioning(sigma))
    assert torch.equal(denoise(net, x, sigma), c_skip * x + c_out * net(c_in * x, c_noise.flatten()))
    assert torch.equal(denoise(net, x, 0.5), denoise(net, x, torch.tensor([0.5, 0.5])))


def test_save_and_load(net: UNet, tmp_path: Path) -> None:
    save({k: v.half() for k, v in net.state_dict().items()}, tmp_path / "unet.safetensors", {"name": "unet"})
    loaded = load(tmp_path / "unet.safetensors")
    assert not loaded.training and {p.dtype for p in loaded.parameters()} == {torch.float32}
    for (name, a), b in zip(net.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a.half().float(), b), name
    assert [p.name for p in tmp_path.iterdir()] == ["unet.safetensors"]  # no temporary file is left


# the committed weights


def metadata_of(name: str) -> dict[str, str]:
    with safe_open(WEIGHTS / f"{name}.safetensors", "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("name", evaluate.NETWORKS)
def test_weights_are_what_the_card_says(name: str) -> None:
    path = WEIGHTS / f"{name}.safetensors"
    assert path.stat().st_size <= 4 * 2**20
    found = json.loads((ZOO / "model_card.json").read_text())
    listed, metadata = found["networks"][name], metadata_of(name)
    assert listed["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and listed["bytes"] == path.stat().st_size
    assert metadata.items() <= listed.items() and metadata["data_sha256"] == found["data"]["train_sha256"]
    assert (
        metadata["command"].startswith(f"python -m benchmarks.zoo.train {name}")
        and metadata["as_if_uninterrupted"] == "true"
    )
    assert json.loads(metadata["settings"])["seed"] == int(metadata["seed"])
    state = load_file(path)
    fit = {k for k, v in state.items() if v.is_floating_point() and v.dtype != torch.float16}
    assert fit == ({"coefficients", "levels", "mean", "prior", "whitening"} if name == "spectral" else set())
    assert all(v.isfinite().all() for v in state.values())
    others = {"unet": load, "unet_cond": load_conditional, "spectral": load_spectral}
    net = others[name]() if name in others else load_classifier(name)
    assert sum(p.numel() for p in net.parameters()) == int(metadata["parameters"])
    assert not net.training


def test_networks_differ() -> None:
    seeds = {metadata_of(name)["seed"] for name in evaluate.NETWORKS}
    assert len(seeds) == len(evaluate.NETWORKS) and len(set(CLASSIFIERS.values())) == 3
    with pytest.raises(ValueError, match="name is 'critic', must be one of"):
        load_classifier("critic")


def test_readme_is_the_card() -> None:
    assert (ZOO / "README.md").read_text() == card.render(json.loads((ZOO / "model_card.json").read_text()))


def test_unet_denoises() -> None:
    """At sigma 0.5 the trained network removes most of the noise from its own samples."""
    net = load()
    x0 = evaluate.sample(net, 8, seed=2, steps=8, quiet=True)
    x = x0 + 0.5 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    error = (denoise(net, x, 0.5) - x0).square().mean().sqrt().item()
    assert error < 0.2, error
    confidence = load_classifier("judge")(x0).softmax(dim=1).amax(dim=1)
    assert confidence.mean() > 0.6


def test_accuracy_on_real_images() -> None:
    try:
        test = data.load_images("test")
    except data.DataError as error:
        pytest.skip(f"no Fashion-MNIST here: {error}")
    found = json.loads((ZOO / "model_card.json").read_text())
    assert test.checksum == found["data"]["test_sha256"]
    part = data.Images(test.pixels[:2000], test.labels[:2000], test.checksum)
    for name, least in (("judge", 0.9), ("guide", 0.88)):
        accuracy = evaluate.accuracy(load_classifier(name), part)[0]
        assert accuracy > least and abs(accuracy - found["accuracy"][name]) < 0.03
