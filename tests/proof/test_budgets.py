"""No kernel costs more than tests/budgets.json says: on sm_90 here, on every target in ``make gpu-proof``."""

import io

import pytest
from rich.console import Console

from proof import budgets, table
from proof.bits import BACKENDS, TARGETS, backend
from proof.roofline import BANDWIDTH, LAUNCH, SLOTS, predict
from proof.workloads import workloads

KEPT = budgets.kept()
ROWS = [(name, target, case, row) for name, targets in KEPT["launches"].items() for target, rows in targets.items()
        for case, row in rows.items()]
# Bytes an element: every input read once, every output written once. A vector of a bank and a known image are inputs; the mask is
# one for all channels, and read for each.
BYTES = {
    "ddim, float32": (8, 4), "ddim, float16": (4, 2), "ddim, bfloat16": (4, 2),
    "ddpm, float32": (8, 4), "ddpm, float16": (4, 2), "ddpm, bfloat16": (4, 2),
    "dpmpp_2m_sde, float32": (12, 8), "dpmpp_2m_sde, float16": (6, 4),  # one estimate is read back, one is kept
    "mixed dtypes, float16": (6, 6),
    "2 steering vectors, float16": (8, 2), "inpainting, float16": (8, 2), "rows by token, float16": (4, 2),
    "ragged, float16": (4, 2), "channels-last, float32": (8, 4),
    "normal, float32": (0, 4), "normal, float16": (0, 2), "normal, bfloat16": (0, 2),
    # The norm of a sample is one number; every sample has vectors of its own. An element of a projection is a product: one number
    # of a vector, and a quarter of one of the sample, which is read for four vectors.
    "norm, float32": (4, 0), "norm, float16": (2, 0), "norm, bfloat16": (2, 0), "norm channels-last, float16": (2, 0),
    "norm ragged, float16": (2, 0), "edit, float32": (8, 4), "edit, float16": (6, 2), "edit, bfloat16": (6, 2),
    "edit channels-last, float16": (6, 2), "edit ragged, float16": (6, 2), "edit with 2 vectors, float16": (10, 2),
    # Counts of a digit read d's inputs once each; the quantile of a sample is four numbers.
    "first digit, float32": (8, 0), "first digit, float16": (4, 0), "first digit, bfloat16": (4, 0), "last digit, float32": (8, 0),
    "last digit, float16": (4, 0), "second digit ragged, float16": (4, 0), "second digit channels-last, float32": (8, 0),
    "quantile, float32": (0, 16),
    "project on 16 vectors, float32": (5, 0), "project on 16 vectors, float16": (4.5, 0), "lift 16 vectors, float32": (64, 4),
    "fold_in, int64": (12, 8), "run_keys, int64": (0, 8), "raw_words, int64": (0, 4),
}  # fmt: skip
# Bytes of the narrowest access where it is not 16: samples that are not aligned or not contiguous, kernels that take any case.
NARROW = {"ragged, float16": 2, "channels-last, float32": 4, "norm ragged, float16": 2, "norm channels-last, float16": 2,
          "edit ragged, float16": 2, "second digit ragged, float16": 2, "quantile, float32": 4, "raw_words, int64": 4, "fold_in, int64": 8,
          "run_keys, int64": 8, ("cuda", "inpainting, float16"): 8, ("cuda", "rows by token, float16"): 8,
          ("triton", "mixed dtypes, float16"): 8, **{("triton", f"{case}16"): 8 for case in (
              "edit, float", "edit, bfloat", "edit channels-last, float", "edit with 2 vectors, float", "project on 16 vectors, float")}}
# Triton brings the two halves of a key together through shared memory, and counts there.
SHARED = ("fold_in, int64", "run_keys, int64", *(case for case in BYTES if " digit" in case))


def test_every_launch_has_a_budget():
    launches = {(name, f"sm_{arch}", case) for name in BACKENDS for arch in TARGETS for case in workloads(backend(name).OPS)}
    assert {row[:3] for row in ROWS} == launches
    assert set(KEPT["compiled"]) == {f"sm_{arch}" for arch in TARGETS}


@pytest.mark.parametrize("name", BACKENDS)
def test_what_no_budget_may_allow(name):
    """Nothing of a thread's own memory, each byte once, 16 bytes an access where that can be."""
    for target, case, row in (row[1:] for row in ROWS if row[0] == name):
        about = f"{name}, {target}, {case}: {row}"
        assert row["spills"] == row["stack"] == 0, about
        assert (row["loaded"], row["stored"]) == pytest.approx(BYTES[case], abs=1e-3), about
        if not (name == "triton" and case in SHARED):
            assert row["shared"] == row["barriers"] == 0, about
        assert row["width"] >= NARROW.get((name, case), NARROW.get(case, 16)), about
        if target == "sm_90":
            assert row["agreeing"] > 0.75 and 0 <= row["double"] < row["sass"] < 2 * row["ptx"], about
    for target, kernels in KEPT["compiled"].items():
        assert all(k["stack"] == k["spills"] == k["shared"] == 0 for k in kernels.values()), target


def test_cuda():
    budgets.same_compilers()
    assert budgets.compared(budgets.measure("cuda", 90, workloads(backend("cuda").OPS)), KEPT) == []


def test_triton():
    """Some: compiling all takes minutes, and is done in ``make gpu-proof``."""
    budgets.same_compilers()
    some = ["ddpm, float16", "2 steering vectors, float16", "normal, float32", "lift 16 vectors, float32", "last digit, float16"]
    assert budgets.compared(budgets.measure("triton", 90, some), KEPT) == []


def test_where_the_default_has_the_better_budget():
    """fastdiff.ops.DEFAULT: CUDA takes fewer instructions for 16-bit samples that lie densely, for normals, for tokens and for
    norms of dense activations; Triton for float32 (where memory is the limit for both), vectors, edits, masks, ragged and channels-last
    samples. At the sizes of latents one launch takes longer than any of it."""
    cuda, triton = (KEPT["launches"][name]["sm_90"] for name in ("cuda", "triton"))
    fewer = {case for case in cuda if case in triton and cuda[case]["sass"] < triton[case]["sass"]}
    assert fewer == {"ddim, float16", "ddim, bfloat16", "ddpm, float16", "ddpm, bfloat16", "dpmpp_2m_sde, float16",
                     "mixed dtypes, float16", "rows by token, float16",
                     "normal, float32", "normal, float16", "normal, bfloat16",
                     "norm, float32", "norm, float16", "norm, bfloat16"}  # fmt: skip
    assert all(predict(cuda[case]).share == 1 for case in ("ddim, float32", "ddpm, float32", "dpmpp_2m_sde, float32"))
    assert all(predict(row).launch_bound > 12 * 4 * 64 * 64 for row in cuda.values())


def test_what_is_worse_is_said():
    row = KEPT["launches"]["cuda"]["sm_90"]["ddpm, float16"]
    assert budgets.worse(row, row) == []
    for key, value in row.items():
        if key in ("kernel", "agreeing"):
            continue
        sign = -1 if key == "width" else 1
        found = budgets.worse({**row, key: value * (1 + 0.03 * sign) + sign}, row)
        assert len(found) == 1 and found[0].startswith(f"{key}: "), (key, found)
        assert budgets.worse({**row, key: value - sign * min(1, value)}, row) == []
    assert budgets.worse({**row, "sass": row["sass"] * 1.019}, row) == []
    assert budgets.worse({**row, "registers": row["registers"] + 1}, row) == [
        f"registers: {row['registers'] + 1}, {row['registers']} budgeted (1 more, {1 / row['registers']:.1%})"]
    assert budgets.worse({**row, "kernel": "other"}, row) == [f"kernel: other, {row['kernel']} is budgeted"]
    assert budgets.compared({("cuda", "sm_90", "new"): row}, KEPT) == [("cuda, sm_90, new", "no budget is written for it")]


def test_the_prediction_is_the_slowest_of_three():
    row = {"loaded": 4, "stored": 2, "sass": 10, "double": 0}
    memory = predict(row)
    assert memory.share == 1 and memory.seconds(10**9) == pytest.approx(6e9 / BANDWIDTH) and memory.seconds(1) == LAUNCH
    issue = predict({**row, "sass": 100, "double": 5})
    assert issue.seconds(10**9) == pytest.approx(105e9 / SLOTS)
    assert issue.share == pytest.approx(6 / BANDWIDTH / (105 / SLOTS)) and issue.share < 1
    assert issue.seconds(issue.launch_bound) == pytest.approx(LAUNCH)


def test_the_table_says_what_is_wrong():
    """Of rows as they are kept: nothing; of a case whose bits differ and of a row that got worse: both, by name."""
    rows = {row[:3]: row[3] for row in ROWS}
    targets = [f"sm_{arch}" for arch in TARGETS]
    proved = {(name, row["kernel"], table.dtype_of(case), target): {"cases": 3, "equal": 3, "failures": {}}
              for name, target, case, row in ROWS}
    text = io.StringIO()
    console = Console(file=text, width=150)
    good = table.report(proved, rows, KEPT["compiled"], targets, console)
    assert good["failures"] == good["over_budget"] == [] and good["executions"] == good["equal"] == 3 * len(proved)
    assert "differ" not in text.getvalue() and "over budget:" not in text.getvalue()
    lines = [line for line in good["rows"] if line["case"]]
    assert len(lines) == sum(len(workloads(backend(name).OPS)) for name in BACKENDS) and all(len(line["targets"]) == 3 and "predicted" in line for line in lines)
    key = ("cuda", "sm_90", "ddpm, float16")
    rows[key] = {**rows[key], "registers": 200}
    proved["triton", "step", "float16", "sm_80"] = {"cases": 3, "equal": 2, "failures": {"step_ 5": "AssertionError: expected 1"}}
    bad = table.report(proved, rows, KEPT["compiled"], targets, console)
    assert [what for what, _ in bad["over_budget"]] == [", ".join(key)] and len(bad["failures"]) == 1
    assert "bits differ: triton, step, float16, sm_80, step_ 5: AssertionError" in text.getvalue()
    assert "over budget: cuda, sm_90, ddpm, float16: registers: 200" in text.getvalue() and "8/9" in text.getvalue()
