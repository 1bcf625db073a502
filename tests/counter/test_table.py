"""The table of launches: a few of its rows counted again, and what it says of fastdiff."""

import json

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from counter import table

STORED = json.loads(table.RESULTS.read_text())
ONE_LAUNCH = {name: [int(name == "big")] for name in table.SHOWN}
AGAIN = ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"]


def stored(name, options):
    return next(row for row in STORED["rows"] if (row["step"], row["options"]) == (name, options))


@pytest.mark.parametrize("entry", [next(e for e in table.DIFFUSERS if e[0] == name) for name in AGAIN], ids=AGAIN)
def test_a_row_counted_again(entry):
    (row,) = table.table_rows([entry], [])
    assert row["ours"] is None or row["ours"] == ONE_LAUNCH
    assert min(row["theirs"]["big"]) >= 4
    if (STORED["torch"], STORED["diffusers"]) != (torch.__version__, diffusers.__version__):
        pytest.skip(f"the stored table is of torch {STORED['torch']} and diffusers {STORED['diffusers']}")
    assert row == stored(*entry[:2])


def test_k_diffusion_counted_again():
    entry = next(e for e in table.K_DIFFUSION if e[0] == "sample_heun")
    (row,) = table.table_rows([], [entry])
    assert row["ours"]["big"] == [2]
    if STORED["torch"] == torch.__version__:
        assert row == stored("sample_heun", {})


def test_the_table_says_one_launch_a_model_call_and_nothing_else():
    compared = [row for row in STORED["rows"] if row["sampler"]]
    assert len(compared) >= 25
    for row in compared:
        assert row["ours"] == {**ONE_LAUNCH, "big": [row["model_calls"]]}, row["step"]


def test_it_can_be_printed():
    shown = table.printed(STORED["rows"])
    assert shown.row_count == len(table.DIFFUSERS) + len(table.K_DIFFUSION)
