import importlib

import pytest
import torch


@pytest.fixture(scope="session")
def ops():
    """torch.ops.fastdiff as fastdiff._C implements it."""
    fastdiff_ops = importlib.import_module("fastdiff.ops")
    choice = next(c for c in fastdiff_ops.backends() if c.device == "cpu" and c.backend == "cpp")
    if not choice.used:
        pytest.skip(f"the C++ backend is not in use: {choice.reason}")
    return torch.ops.fastdiff


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request, ops):
    """Runs the test with each instruction set that this machine has."""
    if request.param not in ops.usable_isas().split():
        pytest.skip(f"this machine runs {ops.usable_isas()}")
    before = ops.isa()
    assert ops.set_isa(request.param) == request.param == ops.isa()
    yield request.param
    ops.set_isa(before)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request, ops):
    """Runs the test with so many threads, and with a grain that gives each of them work."""
    before, grain = torch.get_num_threads(), ops.set_grain(1)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
    ops.set_grain(grain)


@pytest.fixture
def flushing():
    """Switches flush_denormal; off again at the end."""
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)
