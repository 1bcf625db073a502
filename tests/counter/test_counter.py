"""The counter on sequences that were counted by hand."""

import pytest
import torch

import fastdiff  # noqa: F401  registers the ops
from counter.emulated import Counts, Emulated, Gpu

SHAPE = (2, 3, 4)


@pytest.fixture
def gpu():
    with Gpu(latent=24) as gpu, torch.no_grad():
        yield gpu


def counted(gpu, work):
    gpu.take()
    work()
    counts = gpu.take()
    return {name: number for name, number in counts.numbers().items() if number}


def test_kernels_are_split_by_size(gpu):
    x, t = torch.randn(SHAPE, device="cuda"), torch.ones(2, device="cuda")
    assert counted(gpu, lambda: x * 2 + x) == {"big": 2}
    assert counted(gpu, lambda: t * 2 + 1) == {"small": 2}
    assert counted(gpu, lambda: x * t.view(2, 1, 1)) == {"big": 1}
    assert counted(gpu, lambda: x.sum()) == {"big": 1}  # it reads the latent
    assert counted(gpu, lambda: torch.zeros(SHAPE, device="cuda")) == {"big": 1}
    assert counted(gpu, lambda: torch.randn(3, device="cuda")) == {"small": 1}
    assert counted(gpu, lambda: x.add_(1).mul_(2)) == {"big": 2}
    assert counted(gpu, lambda: torch.lerp(x, x, 0.5)) == {"big": 1}


def test_views_and_empty_tensors_cost_nothing(gpu):
    x = torch.randn(SHAPE, device="cuda")
    assert counted(gpu, lambda: x[0, :, 1:].transpose(0, 1).unsqueeze(0).expand(5, -1, -1).permute(2, 0, 1)) == {}
    assert counted(gpu, lambda: (x.view(-1), x.reshape(6, 4), x.detach(), x.chunk(2), x.unbind(0), x.flatten())) == {}
    assert counted(gpu, lambda: (torch.empty(SHAPE, device="cuda"), torch.empty_like(x), x.new_empty(3))) == {}
    assert counted(gpu, lambda: (x.contiguous(), x.to("cuda"), x.float(), x.shape, x.is_contiguous(), x.stride())) == {}
    assert counted(gpu, lambda: x.transpose(0, 1).contiguous()) == {"big": 1}
    assert counted(gpu, lambda: x[:, :, :0] * 2) == {}


def test_what_makes_the_host_wait(gpu):
    x, t = torch.randn(SHAPE, device="cuda"), torch.tensor(3, device="cuda")
    table = torch.arange(10.0)
    read = {"reads": 1, "waits": 1}
    assert counted(gpu, lambda: t.item()) == read
    assert counted(gpu, lambda: float(t)) == read
    assert counted(gpu, lambda: int(t)) == read
    assert counted(gpu, lambda: bool(t)) == read
    assert counted(gpu, lambda: 1 if t > 2 else 0) == {**read, "small": 1}
    assert counted(gpu, lambda: range(10)[t]) == read
    assert counted(gpu, lambda: table[t]) == read  # a number from a CPU table: the row must be known there
    assert counted(gpu, lambda: x.nonzero()) == {**read, "big": 1}
    assert counted(gpu, lambda: x[x > 0]) == {**read, "big": 2}
    assert counted(gpu, lambda: torch.equal(x, x)) == {**read, "big": 1}
    assert counted(gpu, lambda: torch.where(x > 0, x, -x)) == {"big": 3}
    assert counted(gpu, lambda: x.index_select(0, t.view(1) - 3)) == {"small": 1, "big": 1}
    assert counted(gpu, lambda: x[t - 3]) == {**read, "small": 1}


def test_copies(gpu):
    here, x = torch.ones(SHAPE), torch.randn(SHAPE, device="cuda")
    up, down = {"h2d": 1, "waits": 1}, {"d2h": 1, "waits": 1}
    assert counted(gpu, lambda: here.to("cuda")) == up
    assert counted(gpu, lambda: here.cuda()) == up
    assert counted(gpu, lambda: here.to("cuda", non_blocking=True)) == {"h2d": 1}
    assert counted(gpu, lambda: torch.tensor([1.0, 2.0], device="cuda")) == up
    assert counted(gpu, lambda: x.copy_(here)) == up
    assert counted(gpu, lambda: x.copy_(here, non_blocking=True)) == {"h2d": 1}
    assert counted(gpu, lambda: x.cpu()) == down
    assert counted(gpu, lambda: x.to("cpu", non_blocking=True)) == {"d2h": 1}
    assert counted(gpu, lambda: x.tolist()) == down
    assert counted(gpu, lambda: x.transpose(0, 1).cpu()) == {**down, "big": 1}  # packed on the GPU first
    assert counted(gpu, lambda: here.copy_(x)) == down
    assert counted(gpu, lambda: x.half()) == {"big": 1}
    assert counted(gpu, lambda: x.copy_(x + 1)) == {"big": 2}
    assert counted(gpu, lambda: x[torch.tensor([1, 0])]) == {"h2d": 1, "waits": 1, "big": 1}
    assert counted(gpu, lambda: x[torch.tensor([1, 0], device="cuda")]) == {"h2d": 1, "waits": 1, "big": 1}


def test_ops_on_the_cpu(gpu):
    a, x = torch.tensor(2.0), torch.randn(SHAPE, device="cuda")
    assert counted(gpu, lambda: (a * 3).sqrt() + 1) == {"cpu": 3}
    assert counted(gpu, lambda: x * a) == {"big": 1}  # a number beside a tensor is an argument of the kernel


def test_what_is_written_in_place_is_seen_through_views(gpu):
    x = torch.zeros(SHAPE, device="cuda")
    assert counted(gpu, lambda: x[0].add_(1)) == {"small": 1}
    assert counted(gpu, lambda: x.__setitem__((slice(None), 1), x[:, 0] + 5)) == {"small": 2}
    assert x.inner[0].tolist() == [[1] * 4, [6] * 4, [1] * 4] and x.inner[1].tolist() == [[0] * 4, [5] * 4, [0] * 4]


def test_tensors_of_two_devices_do_not_mix(gpu):
    x = torch.ones(SHAPE, device="cuda")
    for work in (lambda: x + torch.ones(4), lambda: torch.stack([x[0, 0, 0], torch.tensor(1.0)]),
                 lambda: torch.where(x > 0, x, torch.ones(4)),
                 lambda: torch.ops.fastdiff.normal_(x, torch.ones(2, 2, dtype=torch.int64))):
        with pytest.raises(RuntimeError, match="same device"):
            work()


def test_under_inference_mode_too():
    with Gpu(latent=24) as gpu, torch.inference_mode():
        x = torch.randn(SHAPE, device="cuda")
        assert counted(gpu, lambda: torch.nn.functional.silu(x).reshape(-1).flatten().float() * 2) == {"big": 2}
        assert counted(gpu, lambda: float(x.sum())) == {"reads": 1, "waits": 1, "big": 1}


def test_nothing_is_left_behind():
    empty, lazy, generator = torch.empty, torch.cuda._lazy_init, torch.Generator
    with Gpu(latent=24):
        x = torch.ones(2, device="cuda")
        assert isinstance(x, Emulated) and x.is_cuda and x.device == torch.device("cuda", 0)
        assert torch.randn(2, generator=torch.Generator("cuda").manual_seed(0), device="cuda").shape == (2,)
    assert (torch.empty, torch.cuda._lazy_init, torch.Generator) == (empty, lazy, generator)
    assert not torch._C._only_lift_cpu_tensors()
    with pytest.raises(RuntimeError, match="outside of"):
        x + 1


def test_counts_start_anew(gpu):
    torch.ones(2, device="cuda")
    assert gpu.take().launches == 1
    assert gpu.take() == Counts()
