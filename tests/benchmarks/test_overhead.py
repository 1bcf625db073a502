"""The figures of steered steps, on a tiny run: every way is there, and what is written is what was measured."""

import json

import torch

import fastdiff as fd
from benchmarks import overhead
from benchmarks.zoo import unet
from fastdiff.steering import NoiseAlignment
from fastdiff.steering.concept import Concept, network_checksum


def test_what_is_written(tmp_path, capsys):
    net = unet.load()
    data = fd.randn((60, *unet.IMAGE_SHAPE), seeds=0)
    NoiseAlignment.fit({"a": data[:30]}, data, sigma=0.5).save(tmp_path / "na.safetensors")
    direction = torch.nn.functional.normalize(fd.randn((1, 128, 7, 7), seeds=1)[0].flatten(), dim=0).view(128, 7, 7)
    Concept(direction, "enc.2", 1.0, network_checksum(net), "a", "mean_difference", 0.9).save(tmp_path / "concept.safetensors")
    overhead.main(["--alignment", str(tmp_path / "na.safetensors"), "--concept", str(tmp_path / "concept.safetensors"), "--batches", "2",
                   "--rounds", "1", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())["batches"]["2"]
    assert len(found) == 6 and found["unsteered"]["over_unsteered"] == 1
    assert all(way["seconds_per_step"] > 0 for way in found.values())
    assert capsys.readouterr().out.count("ms a step") == 6
