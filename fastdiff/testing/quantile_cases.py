"""Golden cases of ``quantile_``: each row of the list below names what it has; the rest is drawn from its name."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from .cases import Case
from .inputs import Draw

__all__ = ["quantile_cases"]

F32, F16, BF16 = "float32", "float16", "bfloat16"
INTERPRETER = ("triton-interpreted",)


@dataclass(frozen=True)
class Quantile:
    """inputs: "dtype" or "dtype layout" of each; row: int, scalar or batch; results: what is written; values: "drawn",
    "equal" (1 and -1), "tiny" (subnormals)."""

    name: str
    shape: tuple = (2, 3, 5, 7)
    inputs: tuple = (F32,)
    q: float = 0.995
    low: float = 1.0
    high: float = 2.0
    rows: int = 2
    row: str = "int"
    scaled: bool = False
    results: tuple = ("out", "clip")
    values: str = "drawn"
    special: float = 0
    slow: tuple = ()


# Sizes about a tile of 256 and a program of 2048 in Triton, blocks of 128 and pieces of 2^14 in C++.
QUANTILES = [
    *(Quantile(f"{n} elements, q = {q}", shape=(2, n), inputs=((F32, F16, BF16)[i % 3],), q=q, slow=INTERPRETER * (n > 300))
      for i, (n, q) in enumerate([(1, 0.5), (2, 0.5), (3, 0.25), (127, 0.995), (256, 0.0), (257, 1.0), (2048, 0.1), (2049, 0.995),
                                  (4100, 0.7)])),
    Quantile("pieces of one sample", shape=(1, 3 * 2**14 + 5), inputs=(F32, F16), q=0.9, slow=INTERPRETER),
    Quantile("samples without a dimension", shape=(5,), inputs=(F16,)),
    *(Quantile(f"whole vectors, {dtype}", shape=(2, 8, 8, 8), inputs=(dtype, dtype)) for dtype in (F32, F16, BF16)),
    Quantile("mixed dtypes and layouts", inputs=(f"{F16} channels_last", F32, f"{BF16} strided")),
    Quantile("channels-last", inputs=(f"{F32} channels_last", f"{F32} channels_last"), q=0.5),
    Quantile("gaps and offsets", shape=(3, 130), inputs=(f"{F16} strided", f"{F32} offset")),
    Quantile("one sample for all", shape=(3, 64), inputs=(f"{F32} expanded", F16), row="batch", rows=3),
    Quantile("twelve inputs", shape=(2, 40), inputs=(F32, F16, BF16) * 4, q=0.6),
    Quantile("rows by sample, scaled", shape=(5, 100), inputs=(F32, F32), rows=4, row="batch", scaled=True, low=0.1),
    Quantile("a row for all, only out", shape=(3, 100), row="scalar", results=("out",)),
    Quantile("only clip, no upper limit", shape=(3, 100), results=("clip",), high=math.inf),
    Quantile("all equal", shape=(2, 300), values="equal", q=0.3),
    Quantile("subnormals", shape=(2, 300), values="tiny", low=1e-45),
    *(Quantile(f"NaN, infinities, subnormals, q = {q}", shape=(4, 200), inputs=(F32, F16), special=0.002, q=q) for q in (0.5, 1.0)),
]  # fmt: skip


def _quantile(e: Quantile) -> Case:
    def build():
        draw = Draw(f"quantile_/{e.name}")
        batch, count = e.shape[0], len(e.inputs)
        inputs = [draw.tensor(e.shape, *what.split(), special=e.special) for what in e.inputs]
        for t in inputs:
            if e.values == "equal":
                t.copy_(torch.where(t < 0, -1.0, 1.0))
            elif e.values == "tiny":
                t.view(torch.int32).copy_(torch.from_numpy(draw.integers(0, 2**23, t.shape)))
        coef = draw.coefficients((e.rows, count + 3), 0.9)
        coef[:, 0] = np.where(coef[:, 0] == 0, 1, coef[:, 0])
        row = None
        if e.row != "int":
            row = torch.from_numpy(np.asarray(draw.integers(0, e.rows, () if e.row == "scalar" else (batch,))))
        wide = torch.full((2, batch, 5), 7.0)  # results stand between other numbers
        return {"out": wide[0, :, 2] if "out" in e.results else None, "clip": wide[1, :, 1:-1] if "clip" in e.results else None,
                "inputs": inputs, "coef": torch.from_numpy(coef), "row": row, "row_index": e.rows - 1 if row is None else 0,
                "scale": torch.from_numpy(draw.coefficients((batch, count), 0.9)) if e.scaled else None,
                "q": e.q, "low": e.low, "high": e.high}

    def run(ops, a, device):
        ops.quantile_(*a.values())
        return {name: a[name] for name in e.results}

    return Case(f"quantile_/{e.name}", "quantile_", build, run, e.slow)


def quantile_cases() -> list[Case]:
    return [*map(_quantile, QUANTILES)]
