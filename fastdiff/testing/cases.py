"""The fixed list of golden cases of the ops: raw words, keys, normals, the step, the ops on vectors, and quantiles.

A case builds its arguments on the CPU, runs an op on whatever device they were moved to, and names the tensors whose bytes
count. Nothing is drawn at run time: see ``inputs``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .inputs import EDGES, Draw

__all__ = ["Case", "op_cases"]


@dataclass(frozen=True)
class Case:
    """build() -> arguments as a dict of CPU tensors; run(ops, arguments, device) -> the tensors to digest, by name.
    slow: backends that would take minutes."""

    name: str
    op: str
    build: Callable[[], dict]
    run: Callable[..., dict]
    slow: tuple[str, ...] = ()


def op_cases() -> list[Case]:
    """Every op but samplers, in the order in which they depend on each other."""
    from .quantile_cases import quantile_cases
    from .step_cases import step_cases
    from .vector_cases import vector_cases

    return [*_raw_words(), *_fold_in(), *_run_keys(), *_normal(), *step_cases(), *vector_cases(), *quantile_cases()]


def _edge_keys() -> torch.Tensor:
    return torch.tensor([(a, b) for a in EDGES[::4] for b in EDGES], dtype=torch.int64)


def _own(returned: torch.Tensor) -> torch.Tensor:
    """In memory of its own: what else lies in the storage of a returned tensor is no part of the answer."""
    return returned.clone(memory_format=torch.contiguous_format)


def _raw_words():
    def case(name, keys, count):
        return Case(f"raw_words/{name}", "raw_words", lambda: {"keys": keys(), "count": count},
                    lambda ops, a, device: {"words": _own(ops.raw_words(a["keys"], a["count"]))})

    yield case("one word", lambda: torch.tensor([[0, 0]]), 1)
    yield case("37 words, counters that carry and wrap", _edge_keys, 37)
    yield case("keys of any strides", lambda: torch.cat([_edge_keys()] * 2, 1).t().contiguous().t()[:, 1:3], 6)
    yield case("1025 words", lambda: torch.from_numpy(Draw("raw_words").keys(3)), 1025)


def _fold_in():
    def case(name, keys, data):
        return Case(f"fold_in/{name}", "fold_in", lambda: {"keys": keys(), "data": data()},
                    lambda ops, a, device: {"keys": _own(ops.fold_in(a["keys"], a["data"]))})

    edges = lambda: torch.tensor(EDGES, dtype=torch.int64)  # noqa: E731
    yield case("one key, one number", lambda: torch.tensor([42, 0]), lambda: torch.tensor(5))
    yield case("keys by numbers, counters that carry and wrap", lambda: _edge_keys()[:, None], edges)
    yield case("one key, many numbers", lambda: torch.tensor([-1, -1]), edges)


def _run_keys():
    def case(name, build):
        return Case(f"run_keys/{name}", "run_keys", build,
                    lambda ops, a, device: {"keys": _own(ops.run_keys(a["seeds"], a["streams"], a["draws"]))})

    edges = torch.tensor(EDGES, dtype=torch.int64)
    yield case("seeds 0..3, the streams by name", lambda: {
        "seeds": torch.arange(4), "streams": torch.arange(7).reshape(7, 1), "draws": torch.zeros(7, 1, dtype=torch.int64)})
    yield case("edges", lambda: {
        "seeds": edges.clone(), "streams": edges.reshape(5, 3).clone(), "draws": edges.flip(0).reshape(5, 3).clone()})
    yield case("a table of 1000 rows", lambda: {
        "seeds": torch.arange(3), "streams": torch.ones(1000, 2, dtype=torch.int64),
        "draws": torch.arange(2000).reshape(1000, 2)})


_NORMAL = [  # shape, layout
    ((1, 1), "contiguous"),
    ((3,), "contiguous"),
    ((2, 7), "contiguous"),
    ((5, 257), "strided"),
    ((2, 4, 16, 16), "contiguous"),
    ((2, 3, 5, 7), "channels_last"),
    ((2, 2, 3, 4, 5), "channels_last"),
    ((3, 4099), "offset"),
]


def _normal():
    def case(name, shape, dtype, layout, offsets=None, slow=()):
        def build():
            draw = Draw(f"normal_/{name}")
            keys = draw.keys(shape[0])
            if offsets is not None:
                keys[:, 1] = np.resize(np.array(offsets, np.int64), shape[0])
            return {"out": draw.tensor(shape, dtype, layout), "keys": torch.from_numpy(keys)}

        def run(ops, a, device):
            ops.normal_(a["out"], a["keys"])
            return {"out": a["out"]}

        return Case(f"normal_/{name}", "normal_", build, run, slow)

    for dtype in ("float32", "float16", "bfloat16"):
        for shape, layout in _NORMAL:
            # The interpreter takes its time: it gets the dtypes that differ most.
            yield case(f"{dtype} {shape} {layout}", shape, dtype, layout, slow=("triton-interpreted",) * (dtype == "float16"))
    yield case("counters that carry and wrap", (len(EDGES), 41), "float32", "contiguous", EDGES)
    yield case("float32 (70000, 3), a folded grid", (70000, 3), "float32", "contiguous", slow=("triton-interpreted",))
    yield case("bfloat16 (70000, 5), a folded grid", (70000, 5), "bfloat16", "strided", slow=("triton-interpreted",))
