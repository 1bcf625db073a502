"""The golden digests: that they are what the reference gives, that every backend of the CPU meets them, and what they cover."""

import json
import shutil

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff import _reference_ops, reference, testing
from fastdiff.testing.cases import op_cases
from fastdiff.testing.digests import agree, digest, difference, folder, golden, run_case, write
from fastdiff.testing.inputs import DTYPES, EDGES, SPECIALS, Draw, laid_out, moved
from fastdiff.testing.sampler_cases import MADE, SEEDS, SHAPE, model

FILES = ("ops.json", "samplers.json", "plans.json", "normals.json")


def test_the_files_are_what_the_reference_writes(tmp_path):
    """`make golden` changes nothing: run it where the meaning of an op was changed on purpose."""
    shutil.copy(folder() / "plans.json", tmp_path)
    said = write(tmp_path)
    assert len(said) == 1, said
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (folder() / name).read_bytes(), f"{name}: run make golden"


def test_the_backend_of_the_cpu_meets_every_digest():
    """Called as a user calls it. Of C++, every instruction set that this machine runs."""
    backend = {"triton": "triton-interpreted"}.get(fd.ops.chosen("cpu"), fd.ops.chosen("cpu"))
    report = testing.assert_backends_agree("cpu", backends=[backend])
    slow = sum(len(missing.cases) for missing in report.not_run)
    sets = torch.ops.fastdiff.usable_isas().split() if backend == "cpp" else [""]
    assert len(report.results) == len(sets) * (len(golden().cases) - slow)
    assert backend != "cpp" or slow == 0


def test_every_op_sampler_schedule_and_dtype_has_cases():
    names = [case.name for case in golden().cases]
    assert len(set(names)) == len(names)
    assert {case.op for case in golden().cases} == {"raw_words", "fold_in", "run_keys", "normal_", "step_", "project_", "lift_", "edit_", "quantile_", "sampler"}
    mine = {name for name, entry in fd.SAMPLERS.items() if entry.stages.__module__.startswith("fastdiff.")}
    assert {made.sampler for made in MADE} == mine, "a new sampler needs golden cases: fastdiff/testing/sampler_cases.py"
    for sampler in mine - {"flow_euler", "flow_heun"}:
        kinds = {made.fresh().info["schedule"] for made in MADE if made.sampler == sampler}
        assert {"scaled_linear", "ve", "flow"} <= kinds
        for dtype in DTYPES:
            assert any(name.startswith(f"sampler/{sampler},") and name.endswith(dtype) for name in names), (sampler, dtype)


def test_only_the_interpreter_and_one_case_of_the_reference_are_left_out():
    slow = {(case.name, backend) for case in golden().cases for backend in case.slow}
    assert {backend for _, backend in slow} == {"triton-interpreted", "reference"}
    assert [name for name, backend in slow if backend == "reference"] == ["step_/70000 samples, a folded grid"]
    interpreted = [case for case in golden().cases if "triton-interpreted" not in case.slow]
    ran = {name.split(",")[0] for name in (case.name for case in interpreted) if name.startswith("sampler/")}
    assert len(ran) >= len(fd.SAMPLERS) - 2


def test_stored_tables_are_what_samplers_make():
    """By tolerance: a mathematics library may move the last bit of a coefficient."""
    stored = json.loads((folder() / "plans.json").read_text())["content"]
    assert list(stored) == [made.name for made in MADE]
    for made in MADE:
        assert agree(stored[made.name], made.fresh()), f"{made.name}: run make golden if the sampler was changed on purpose"


@pytest.mark.parametrize("change, same", [(1e-8, True), (1e-6, False), (-2, False)])
def test_tables_agree_up_to_the_last_bits(change, same):
    plan = fd.plan("dpmpp_2m", schedule="edm", steps=4)
    table = json.loads(plan.to_json())
    coef = plan.coef.copy()
    coef[1, 0] *= 1 + change
    other = fd.Plan(**{**plan.__dict__, "coef": coef})
    assert agree(table, other) is same
    assert not agree(table, fd.plan("dpmpp_2m", schedule="edm", steps=5))
    assert not agree({**table, "format": 0}, plan)


@pytest.mark.parametrize("made", MADE, ids=lambda made: made.name)
def test_sample_ends_where_the_case_ends(made):
    """The digests are of a loop written for them; ``fd.sample`` is the one that people call."""
    plan = golden().plans[made.name]
    for case in [case for case in golden().cases if case.name.startswith(f"sampler/{made.name}, ") and
                 case.name.removeprefix(f"sampler/{made.name}, ") in DTYPES]:  # fmt: skip
        given = case.build()
        del given["seeds"]
        outputs = 1 + ("uncond" in plan.inputs)
        got = fd.sample(lambda x, t: model(x, outputs), plan, SHAPE, SEEDS, dtype=DTYPES[case.name.rsplit(", ", 1)[1]], **given)
        expected = run_case(case, torch.ops.fastdiff)
        assert torch.equal(got, expected["x"][-1])
        assert int(expected["status"][0]) == 2**31 - 1


# ---- where a digest is not met


def test_a_difference_names_the_element():
    case = next(case for case in op_cases() if case.name == "step_/in place")
    result = run_case(case, _reference_ops)
    assert difference(case, result) == ""
    result["outputs[1]"].view(torch.int16)[1, 2, 0, 3] ^= 1
    said = difference(case, result)
    assert said.startswith("outputs[1][1, 2, 0, 3] is ") and "1 of 210 elements" in said and "expected" in said


def test_bytes_between_the_samples_count():
    case = next(case for case in op_cases() if case.name == "step_/gaps between samples")
    result, wanted = run_case(case, _reference_ops), golden().digests[case.name]["digest"]
    assert digest(result) == wanted
    out = result["outputs[0]"]
    torch.empty(0).set_(out.untyped_storage())[0] = 8.0
    assert digest(result) != wanted and "outside" in difference(case, result)


# ---- what cases are made of


def test_arguments_are_the_stored_ones():
    """On every version of Python, NumPy and torch: else a digest would say nothing."""
    for case in golden().cases:
        assert digest(moved(case.build(), "cpu"))[:16] == golden().digests[case.name]["given"], case.name


def test_numbers_are_exact():
    draw = Draw("a name")
    words, again = draw.words(9), Draw("a name").words(9)
    assert np.array_equal(words, again) and not np.array_equal(words, draw.words(9))
    values = Draw("values").values((4096,))
    assert values.dtype == np.float32 and -2 <= values.min() < -1.99 and 1.99 < values.max() < 2
    assert (values * 2.0**22 == np.round(values * 2.0**22)).all() and abs(values.mean()) < 0.1
    special = Draw("values").values((4096,), 0.3)
    assert 0.25 < np.isin(special.view(np.uint32), SPECIALS).mean() < 0.35 and np.isnan(special).any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "offset", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_hold_the_values(dtype, layout):
    values = Draw("layouts").values((2, 3, 4, 5), 0.2)
    if layout == "expanded":
        values[1] = values[0]
    made = laid_out(values, dtype, layout)
    there = moved({"a": made, "b": [made[1:]]}, "cpu")
    assert there["a"].stride() == made.stride() and there["b"][0].data_ptr() == there["a"][1:].data_ptr() != made[1:].data_ptr()
    expected = torch.from_numpy(values).to(DTYPES[dtype])
    assert torch.equal(made.nan_to_num(7), expected.nan_to_num(7)) and torch.equal(made.isnan(), expected.isnan())


# ---- vectors for other implementations


def test_normal_vectors():
    content = json.loads((folder() / "normals.json").read_text())["content"]
    pairs = np.array([[int(v, 16) for v in row] for row in content["pairs"]], np.uint32)
    for w0, w1, z0, z1 in pairs[::7]:
        z = reference.box_muller(np.array([w0, w1, 0, 0], np.uint32))
        assert (z[:2].view(np.uint32) == (z0, z1)).all()
    assert {0, 1, 2**31, 2**32 - 1} <= set(pairs[:, 0].tolist())
    assert {k * 2**29 for k in range(8)} <= set(pairs[:, 1].tolist())
    u = reference.uniform(pairs[:, 0])
    assert (u == 1).any() and (pairs[u == 1, 2:] & 0x7FFFFFFF == 0).all(), "u = 1 gives a radius of exactly 0"

    keys = torch.tensor([[(int(v) + 2**63) % 2**64 - 2**63 for v in row[:2]] for row in content["keys"]])
    assert set(keys[:, 1].tolist()) == set(EDGES)

    def in_bits(words):
        return [[f"0x{w & 0xFFFFFFFF:08x}" for w in row] for row in words.tolist()]

    assert in_bits(torch.ops.fastdiff.raw_words(keys, 6)) == [row[2] for row in content["keys"]]
    out = torch.empty(len(keys), 6)
    torch.ops.fastdiff.normal_(out, keys)
    assert in_bits(out.view(torch.int32)) == [row[3] for row in content["keys"]]
