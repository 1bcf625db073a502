"""Files of fitted things: what was written comes back, and nothing else does."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastdiff as fd
from fastdiff.steering import LatentVector, NoiseAlignment, files

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2.5, dtype=torch.float64),
           "c": torch.zeros(0, 3, dtype=torch.bfloat16)}
ABOUT = {"kind": "concept", "block": "down.2", "sigma": 0.75, "shape": [2, 3], "fitted": {"count": 7}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "thing.safetensors"
    files.save(path, TENSORS, ABOUT)
    return path


def test_what_was_written_comes_back(path):
    tensors, about = files.load(path, "concept")
    assert about == ABOUT
    assert set(tensors) == set(TENSORS)
    assert all(torch.equal(tensors[name], t) and tensors[name].dtype == t.dtype for name, t in TENSORS.items())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_views_of_one_memory_are_taken(tmp_path):
    whole = torch.arange(8.0)
    files.save(tmp_path / "f", {"whole": whole, "half": whole[::2]}, ABOUT)
    assert torch.equal(files.load(tmp_path / "f", "concept")[0]["half"], whole[::2])


def test_every_byte_counts(path):
    """A bit flipped anywhere is noticed, or is in what means nothing: padding of the header."""
    content, noticed = path.read_bytes(), 0
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        try:
            tensors, about = files.load(path, "concept")
        except ValueError:
            noticed += 1
        else:
            assert about == ABOUT and all(torch.equal(tensors[name], t) for name, t in TENSORS.items())
    assert noticed > 0.9 * len(range(0, len(content), 7))


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_half_a_file_is_refused(path, cut):
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="thing.safetensors is not a whole safetensors file"):
        files.load(path, "concept")


def rewritten(path, **changes):
    """The file with other metadata, its checksum as it was."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={k: v for k, v in (metadata | changes).items() if v is not None})


@pytest.mark.parametrize("changes, says", [
    ({"format": "fastdiff.steering.9"}, "has format 'fastdiff.steering.9': 'fastdiff.steering.1' is taken"),
    ({"format": "fastdiff.run.1"}, "has format 'fastdiff.run.1'"),
    ({"format": None}, "has format None"),
    ({"about": json.dumps(ABOUT | {"sigma": 1.75})}, "is damaged"),
    ({"about": None}, "is damaged"),
    ({"sha256": "0" * 64}, "is damaged"),
    ({"sha256": None}, "is damaged"),
])
def test_other_files_are_refused(path, changes, says):
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=says):
        files.load(path, "concept")


def test_another_kind_is_refused(path, tmp_path):
    with pytest.raises(ValueError, match="holds 'concept': 'latent_vector' is taken"):
        LatentVector.load(path)
    with pytest.raises(ValueError, match="holds 'concept': 'noise_alignment' is taken"):
        NoiseAlignment.load(path)
    with pytest.raises(ValueError, match="did you mean 'concept'"):
        files.load(path, "concepts")
    with pytest.raises(FileNotFoundError):
        files.load(tmp_path / "nothing", "concept")
    with pytest.raises(OSError):
        files.load(tmp_path, "concept")


@pytest.mark.parametrize("about, error, says", [
    ({"kind": "nothing"}, ValueError, "kind of steering file 'nothing' is not known"),
    ({}, ValueError, "kind"),
    ({"kind": "concept", "auc": float("nan")}, ValueError, "JSON"),
    ({"kind": "concept", "shape": (1, 2)}, TypeError, "JSON does not give back"),
    ({"kind": "concept", "classes": {3: "cat"}}, TypeError, "JSON does not give back"),
    ({"kind": "concept", "plan": object()}, TypeError, "JSON serializable"),
])
def test_what_json_does_not_hold_is_refused_before_anything_is_written(tmp_path, about, error, says):
    with pytest.raises(error, match=says):
        files.save(tmp_path / "f", TENSORS, about)
    assert not list(tmp_path.iterdir())


def test_the_digest_is_of_names_dtypes_shapes_and_bytes():
    made = {"a": torch.arange(6.0), "b": torch.ones(2)}
    same = {"b": torch.ones(4)[::2], "a": torch.arange(6.0)}
    assert files.digest(made) == files.digest(same)
    others = [made | {"a": made["a"].double()}, made | {"a": made["a"].reshape(2, 3)}, made | {"a": made["a"] + 1},
              {"a": made["a"]}, {"a": made["a"], "c": made["b"]}, made | {"a": torch.tensor([0.0, 1, 2, 3, 4, 5.0000005])}]
    assert len({files.digest(t) for t in [made, *others]}) == len(others) + 1
    assert files.digest(torch.nn.Linear(2, 2).state_dict()) != files.digest(torch.nn.Linear(2, 2).state_dict())


def damage(path, change):
    """A whole file, checksum and all, whose content makes no sense."""
    tensors, about = files.load(path, "noise_alignment")
    change(tensors, about)
    files.save(path, tensors, about)


@pytest.mark.parametrize("change, says", [
    (lambda t, a: t.pop("full.mean"), "mean: missing"),
    (lambda t, a: t.update({"full.mean": t["full.mean"].float()}), "mean: missing or of another dtype"),
    (lambda t, a: t.update({"full.eigenvalues": -t["full.eigenvalues"]}), "positive and falling"),
    (lambda t, a: t.update({"target.0.basis": t["target.0.basis"][:1]}), "a basis of shape"),
    (lambda t, a: a["targets"].append("more"), "holds full, target.0: full, target.0, target.1 are taken"),
    (lambda t, a: a["fitted"].pop("full"), "are taken"),
    (lambda t, a: a["fitted"]["full"].update(shape=[8]), r"fitted on samples of shape \[8\]"),
])
def test_alignments_that_make_no_sense_are_refused(tmp_path, change, says):
    data = fd.randn((30, 4), seeds=0)
    path = tmp_path / "na"
    NoiseAlignment.fit(data[:10], data).save(path)
    NoiseAlignment.load(path)
    damage(path, change)
    with pytest.raises(ValueError, match=says):
        NoiseAlignment.load(path)
