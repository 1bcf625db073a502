"""Concepts: fitted on a network, kept in files, refused on any other."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.steering.collect import collect
from fastdiff.steering.concept import Concept, fit_concepts, network_checksum
from fastdiff.steering.directions import METHODS, fit_directions
from fastdiff.steering.inject import Injection

from .networks import unet_2d, zoo

EDM = {"schedule": "edm", "prediction": "edm", "sigma_data": 0.7}
QUICK = {"rfm": {"bandwidth": 1.0, "iterations": 2}, "mean_difference": {}, "covariance_aware": {"ridge": (1.0, 10.0)}}


def stripes(count=48, size=16):
    """Images in [-1, 1] of three kinds: stripes one way, the other way, a spot; with noise."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    wave = torch.sin(torch.arange(size) * 1.2)
    grid = torch.stack(torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij"))
    kinds = torch.stack([wave.expand(size, size), wave[:, None].expand(size, size), 2 * torch.exp(-4 * grid.square().sum(0)) - 1])
    return (kinds[labels][:, None] + 0.3 * torch.randn(count, 1, size, size, generator=g)).clamp(-1, 1), labels


@pytest.fixture(scope="module")
def fitted():
    network = zoo()
    images, labels = stripes()
    return network, fit_concepts(network, "enc.2", images, labels, 0.5, "mean_difference", **EDM)


@pytest.mark.parametrize("method", METHODS)
def test_concepts_of_all_classes(method):
    network, (images, labels) = zoo(), stripes()
    concepts = fit_concepts(network, "enc.2", images, labels, 0.5, method, **EDM, **QUICK[method])
    assert list(concepts) == [0, 1, 2]
    expected = fit_directions(collect(network, "enc.2", images, 0.5, **EDM), labels, method, **QUICK[method])
    for label, c in concepts.items():
        assert torch.equal(c.direction, expected[label].vector) and c.auc == expected[label].auc
        assert (c.block, c.sigma, c.label, c.method, c.network) == ("enc.2", 0.5, label, method, network_checksum(network))
        assert c.settings["chosen"] in c.settings["trials"] and c.settings["samples"] == 48
        assert c.direction.shape == (32, 4, 4) and c.auc > 0.8


def test_concepts_of_a_network_of_diffusers():
    images, labels = stripes()
    names = ["across" if k == 0 else "other" for k in labels]
    concepts = fit_concepts(unet_2d(), "down_blocks.2", images, names, 0.3, "mean_difference", classes=["across"],
                            schedule="linear")
    assert list(concepts) == ["across"] and concepts["across"].direction.shape == (16, 4, 4)


def test_labels_of_numpy_and_another_default_device(fitted):
    network, concepts = fitted
    images, labels = stripes()
    with torch.device("meta"):
        again = fit_concepts(network, "enc.2", images, list(labels.numpy()), 0.5, "mean_difference", classes=np.array([2, 1]),
                             **EDM)
    assert [(type(c.label), c.label) for c in again.values()] == [(int, 2), (int, 1)]
    assert all(torch.equal(c.direction, concepts[label].direction) for label, c in again.items())


def test_a_file_gives_everything_back(fitted, tmp_path):
    network, concepts = fitted
    for concept in (concepts[1], replace(concepts[1], label="stripes")):
        concept.save(tmp_path / "concept.safetensors")
        back = Concept.load(tmp_path / "concept.safetensors")
        assert torch.equal(back.direction, concept.direction)
        for name in ("block", "sigma", "network", "label", "method", "auc", "settings"):
            assert getattr(back, name) == getattr(concept, name)
        back.check(network)


def test_a_damaged_file_is_refused(fitted, tmp_path):
    path = tmp_path / "concept.safetensors"
    fitted[1][0].save(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        Concept.load(path)
    with pytest.raises(FileNotFoundError):
        Concept.load(tmp_path / "another.safetensors")


def test_a_concept_steers_a_sample(fitted):
    network, concepts = fitted
    plan = fd.plan("euler", steps=6, **EDM)
    action = concepts[0].at(0.3, 2.0, window=(0.2, 20.0))
    assert isinstance(action, Injection)
    assert (action.concept, action.weight, action.scale, action.window) == (concepts[0], 0.3, 2.0, (0.2, 20.0))
    free, steered, none = (fd.sample(network, plan, (2, 1, 16, 16), 0, steering=s) for s in ([], [action], [concepts[0].at(0.0)]))
    assert torch.equal(free, none) and not torch.equal(free, steered) and torch.isfinite(steered).all()


def test_another_network_is_refused(fitted):
    network, concepts = fitted
    plan, action = fd.plan("euler", steps=4, **EDM), concepts[0].at(0.1)
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.mid.block1.conv1.bias[0] += 1e-6
    with pytest.raises(ValueError, match="the concept 0 was learnt in UNet .* with checksum .*; this network is UNet"):
        concepts[0].check(other)
    with pytest.raises(ValueError, match="the concept 0 was learnt in UNet"):
        fd.sample(other, plan, (2, 1, 16, 16), 0, steering=[action])
    with pytest.raises(ValueError, match=r"block 'enc\.2' is not in UNet2DModel"):
        concepts[0].check(unet_2d())
    with pytest.raises(TypeError, match="network is function"):
        concepts[0].check(lambda x, t: x)


def test_another_block_or_shape_is_refused(fitted):
    network, concepts = fitted
    concepts[0].check(network, shape=(32, 4, 4))
    with pytest.raises(ValueError, match=r"of shape \(32, 4, 4\) of block 'enc\.2': it cannot be used for \(32, 7, 7\)"):
        concepts[0].check(network, shape=torch.Size([32, 7, 7]))
    with pytest.raises(ValueError, match=r"block 'enc\.3' is not in UNet: did you mean 'enc\.2'"):
        replace(concepts[0], block="enc.3").check(network)
    with pytest.raises(ValueError, match=r"\(32, 7, 7\)"):  # larger images than it was learnt from
        fd.sample(network, fd.plan("euler", steps=4, **EDM), (2, 1, 28, 28), 0, steering=[concepts[0].at(0.1)])


def test_the_checksum_is_of_names_shapes_dtypes_and_bytes():
    network = zoo()
    first = network_checksum(network)
    assert network_checksum(zoo()) == first and network_checksum(copy.deepcopy(network)) == first
    assert network_checksum(torch.compile(network)) == first  # not run: a wrapper around the same weights
    with torch.no_grad():
        p = network.stem.weight
        in_place, unseen, whole = (lambda: p.view(-1)[0].mul_(1 + 2**-20), lambda: p.data.add_(1e-3),
                                   lambda: setattr(p, "data", p.data.flip(0) * 2))
        for change in (in_place, unseen, whole):  # in place, behind autograd's back, and the whole tensor
            change()
            now = network_checksum(network)
            assert now != first
            first = now
    assert network_checksum(network.half()) != first
    assert network_checksum(torch.nn.Linear(2, 3)) != network_checksum(torch.nn.Linear(3, 2))
    one, two = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Module()
    two.add_module("1", one[0])
    assert network_checksum(one) != network_checksum(two)


def test_a_network_with_buffers_and_other_dtypes():
    network = torch.nn.BatchNorm2d(3)
    network.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    network.register_buffer("mask", torch.zeros(2, dtype=torch.bool))
    seen = {network_checksum(network)}
    for change in (network.num_batches_tracked.add_, network.phase.add_, network.mask.logical_or_):
        change(torch.tensor(1))
        seen.add(network_checksum(network))
    assert len(seen) == 4


GOOD = {"direction": torch.eye(2)[0], "block": "mid", "sigma": 0.5, "network": "ab" * 32, "label": 3, "method": "rfm", "auc": 0.9}


@pytest.mark.parametrize("change, error, message", [
    ({"direction": torch.ones(2)}, ValueError, "direction has norm 1.41421: a unit vector"),
    ({"direction": torch.full((2,), float("nan"))}, ValueError, "direction has norm nan"),
    ({"direction": torch.eye(2, dtype=torch.float64)[0]}, TypeError, "direction is torch.float64"),
    ({"direction": [1.0, 0.0]}, TypeError, "direction is list"),
    ({"block": 2}, TypeError, "block is 2"),
    ({"label": None}, TypeError, "label is None"),
    ({"sigma": -1.0}, ValueError, "sigma is -1.0"),
    ({"auc": 1.5}, ValueError, "auc is 1.5"),
])
def test_fields_that_make_no_concept(change, error, message):
    with pytest.raises(error, match=message):
        Concept(**{**GOOD, **change})
    assert "Concept(3, (2,) at 'mid', sigma 0.5, rfm, AUC 0.900" in repr(Concept(**GOOD))


@pytest.mark.parametrize("change, error, message", [
    ({"labels": [0] * 47 + [1]}, ValueError, "label 0 is that of 47 of 48"),
    ({"labels": [0]}, ValueError, "labels has 1 entries"),
    ({"images": stripes()[0].index_fill(0, torch.tensor([7]), float("nan"))}, ValueError, "image 7 holds NaN"),
    ({"block": "enc.9"}, ValueError, "block 'enc.9' is not in UNet"),
    ({"sigma": 0}, ValueError, "sigma is 0"),
    ({"schedule": None}, TypeError, "how the network is called is missing"),
    ({"method": "rmf"}, ValueError, "did you mean 'rfm'"),
    ({"iteration": 3}, TypeError, "Options: none"),
    ({"method": "rfm", "bandwidth": -1.0}, ValueError, "bandwidth is "),
])
def test_wrong_input_is_refused_before_the_network_runs(change, error, message):
    network, ran = zoo(), []
    network.register_forward_pre_hook(lambda *a: ran.append(1))
    images, labels = stripes()
    given = {"block": "enc.2", "images": images, "labels": labels, "sigma": 0.5, "method": "mean_difference", **EDM, **change}
    with pytest.raises(error, match=message):
        fit_concepts(network, **given)
    assert not ran


def test_on_fashion_mnist():
    """The zoo's own network and data: what its last encoder block knows of the classes at sigma 0.5."""
    from benchmarks.zoo import data, unet

    try:
        half = data.load_images("test")
    except data.DataError as error:
        pytest.skip(str(error))
    images, labels = half.batch(slice(0, 300)), half.labels[:300]
    concepts = fit_concepts(unet.load(), "enc.2", images, labels, 0.5, "covariance_aware", schedule="edm", prediction="edm",
                            sigma_data=unet.SIGMA_DATA)
    aucs = {data.CLASSES[label]: c.auc for label, c in concepts.items()}
    assert len(aucs) == 10 and min(aucs["Trouser"], aucs["Ankle boot"]) > 0.9 and min(aucs.values()) > 0.6
