"""The checkout's networks, one thread for tiny ones, and an alignment."""

import pytest
import torch

from steering.classes import fitted

import checkout  # noqa: F401  isort: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks gain nothing from more threads, and threads that wait for a core another program has lose much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def na():
    """A noise alignment of three classes, with all directions."""
    return fitted(sigma=0.0)
