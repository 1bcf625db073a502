"""A CUDA graph replays one launch: the same kernel with the same parameter bytes, while the row advances in device memory.
Here one recorded launch of each backend is executed once a row: a whole run of a plan, equal to the eager one in every bit."""

import pytest
import torch

import fastdiff as fd
from cases import Case
from proof.bits import backend
from proof.execute import execute, written

SHAPE, SEEDS = (2, 3, 8, 9), [7, -1]


def model(x, time):
    """Any function of both; it rounds as the dtype of x does."""
    return (x.float() * torch.cos(time).view(-1, 1, 1, 1) + torch.sin(3 * x.float())).to(x.dtype)


def replayed(plan, dtype, backend, arch):
    """The buffers after each row of a run whose only launch was recorded before the first."""
    plan = plan.with_model_dtype(dtype)

    def empty(name):  # what was never written must not matter
        return torch.full(SHAPE, float("nan"), dtype=torch.float32 if name in ("x", "carry") else dtype)

    buffers = {name: empty(name) for name in (*plan.inputs, *plan.outputs)}
    coef, meta = map(torch.from_numpy, plan.table())
    keys = None
    if plan.noises:
        streams, draws = torch.from_numpy(plan.streams.copy()), torch.from_numpy(plan.draws.copy())
        keys = torch.ops.fastdiff.run_keys(torch.tensor(SEEDS), streams, draws)
    row = torch.zeros((), dtype=torch.int64)
    case = Case([buffers[name] for name in plan.inputs], [buffers[name] for name in plan.outputs],
                torch.full((plan.ring, *SHAPE), float("nan")) if plan.ring else None, coef, meta, row, 0, keys,
                status=torch.tensor([2**31 - 1, 0], dtype=torch.int32))
    recording = backend.record(arch, "step_", *case.args())
    assert len(recording.launches) == 1
    for r in range(len(plan)):
        if plan.calls_model[r]:
            time = torch.tensor(plan.times[r], dtype=torch.float32).expand(SHAPE[0])
            buffers["out"].copy_(model(buffers[plan.model_input], time))
        row.fill_(r)
        execute(recording, written(case))
        yield r, buffers["x"], buffers[plan.model_input], case.status


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde", "heun"])
@pytest.mark.parametrize("which", ["cuda", "triton"])
def test_replays_are_the_eager_run(which, name, dtype):
    plan = fd.plan(name, schedule="scaled_linear", steps=5)
    run = fd.Stepper(plan, SHAPE, SEEDS, dtype=dtype)
    for r, x, given, status in replayed(plan, dtype, backend(which), 90):
        if not plan.calls_model[r]:
            continue
        run.step(model(run.model_input, run.time))
        if r + 1 == len(plan) or plan.calls_model[r + 1]:
            assert torch.equal(x, run.x) and torch.equal(given, run.model_input), f"row {r}"
    assert run.done and torch.equal(x, run.result()) and status.tolist() == run.status.tolist() == [2**31 - 1, 0]
