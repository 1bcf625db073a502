"""Golden cases of ``step_``: each row of the list below names what it has; the rest is drawn from its name."""

from dataclasses import dataclass, field

import numpy as np
import torch

from .. import reference
from ..reference.step import CLIP, MASK_INPUT, NEVER
from .cases import Case
from .inputs import EDGES, Draw

__all__ = ["step_cases"]

F32, F16, BF16 = "float32", "float16", "bfloat16"
IMAGE = (2, 3, 5, 7)


@dataclass(frozen=True)
class Step:
    """inputs, outputs: "dtype" or "dtype layout"; an output "=1" is inputs[1] itself. masks: 0 is an input, 1 is d, 2.. are
    the y_i. special: the share of NaN, infinities, subnormals and their like among the values."""

    name: str
    shape: tuple = IMAGE
    inputs: tuple = (F32, F32)
    outputs: tuple = (F32,)
    ring: int = 0
    ring_dtype: str = F32
    rows: int = 1
    row: str = "int"  # or scalar, batch, tokens
    noises: int = 0
    keys: str = "rows"  # or shared, edges
    bank: int = 0
    bank_dtype: str = F32
    clip: tuple = ()  # lo, hi, factor of every row; or "sample": of each sample
    masks: tuple = ()
    mask: tuple | None = None  # shape
    mask_dtype: str = F32
    known: str = F32
    scale: bool = False
    special: float = 0
    density: float = 0.75  # share of the coefficients that are not 0; 0: d is the first input, and so is each y
    status: tuple | None = (NEVER, 0)  # as it is before the step
    slow: tuple = field(default=())


_CLIP = (-0.5, 0.75, 1.25)
_SIZES = (1, 2, 3, 4, 5, 7, 8, 15, 17, 31, 63, 65, 127, 129, 255, 257, 1023, 1025, 2049)

STEPS = [
    *(Step(f"{n} elements, noise, {dtype}", shape=(2, n), inputs=(F32, dtype), outputs=(F32, dtype), noises=1,
           slow=("triton-interpreted",) * (n > 300 or dtype == BF16))
      for i, n in enumerate(_SIZES) for dtype in ((F32, F16, BF16)[i % 3],)),
    *(Step(f"samples without a dimension, {dtype}", shape=(5,), inputs=(dtype,), outputs=(dtype,), noises=1)
      for dtype in (F32, F16)),
    # dtypes
    *(Step(f"{a} and {b} to {c} and {d}", inputs=(a, b), outputs=(c, d), noises=1)
      for a, b, c, d in [(F32, F16, F32, F16), (F32, BF16, F32, BF16), (F16, BF16, BF16, F16), (F16, F16, F16, F16),
                         (BF16, BF16, BF16, BF16), (F16, F32, F16, BF16), (F32, F32, F16, BF16)]),
    Step("float16, whole tiles", shape=(2, 4, 16, 16), inputs=(F16, F16), outputs=(F16,)),
    Step("bfloat16, whole tiles, noise", shape=(2, 4, 16, 16), inputs=(BF16, BF16), outputs=(BF16,), noises=1),
    Step("float32, whole tiles, noise", shape=(2, 4, 16, 16), noises=1),
    # layouts
    Step("channels-last everywhere", inputs=(f"{F32} channels_last", f"{F16} channels_last"), outputs=(f"{F32} channels_last",),
         noises=1),
    Step("channels-last everywhere, no noise", inputs=(f"{F32} channels_last",) * 2, outputs=(f"{F32} channels_last",)),
    Step("channels-last in, contiguous out", inputs=(f"{F16} channels_last", F32), noises=1,
         outputs=(F32, f"{F16} channels_last")),
    Step("channels-last video", shape=(2, 2, 3, 4, 5), inputs=(f"{BF16} channels_last", F32), noises=1,
         outputs=(f"{BF16} channels_last",)),
    Step("gaps between samples", inputs=(f"{F32} strided", f"{F16} strided"), noises=1,
         outputs=(f"{F32} strided", f"{BF16} strided")),
    Step("offsets", shape=(3, 64), inputs=(f"{F32} offset", f"{F16} offset"), noises=1,
         outputs=(f"{F16} offset", f"{F32} offset")),
    Step("one sample for all", inputs=(f"{F32} expanded", F32), outputs=(F32,), noises=1),
    Step("in place", inputs=(F32, F16), outputs=("=0", "=1"), noises=1),
    Step("in place, channels-last", inputs=(f"{F32} channels_last", F32), outputs=("=0",)),
    # noise
    Step("two noises", shape=(3, 130), noises=2),
    Step("16 noises, three outputs", shape=(2, 66), outputs=(F32, F16, BF16), noises=16, density=0.5),
    Step("keys shared by rows", shape=(2, 33), rows=3, row="batch", noises=2, keys="shared"),
    Step("counters that carry and wrap", shape=(len(EDGES), 41), noises=1, keys="edges"),
    Step("noise alone", shape=(2, 100), inputs=(), outputs=(F32, F16), noises=2),
    # ring
    Step("a ring slot", ring=1, rows=2, noises=1),
    Step("three ring slots of float16, read and written", ring=3, ring_dtype=F16, rows=3, row="batch", shape=(4, 50),
         density=0.9),
    Step("three ring slots of bfloat16, by tokens", ring=3, ring_dtype=BF16, rows=3, row="tokens", shape=(2, 6, 11),
         density=0.9),
    Step("a ring slot and no output", ring=1, outputs=(), shape=(2, 21)),
    # rows
    Step("row on the device", rows=4, row="scalar", noises=1),
    Step("a row for each sample", shape=(5, 67), rows=4, row="batch", noises=2, outputs=(F32, F16)),
    Step("a row for each token", shape=(2, 6, 35), rows=4, row="tokens", noises=1),
    Step("a row for each token, float16", shape=(3, 8, 64), rows=4, row="tokens", noises=1, inputs=(F16, F16), outputs=(F16,)),
    # masks
    Step("mask of one image, at d", masks=(1,), mask=(1, 1, 5, 7)),
    Step("mask of each image, at y, noise", masks=(2,), mask=(2, 1, 5, 7), noises=1, mask_dtype=F16),
    Step("mask of each element, at an input", masks=(0,), mask=IMAGE, noises=1, mask_dtype=BF16, known=F16),
    Step("masks everywhere", masks=(0, 1, 2, 3, 4), mask=(1, 1, 1, 7), noises=2, outputs=(F32, F16, BF16)),
    Step("mask, channels-last", masks=(1, 2), mask=(2, 1, 5, 7), noises=1, inputs=(f"{F32} channels_last",) * 2,
         known=f"{F32} channels_last"),
    Step("mask, whole tiles", shape=(2, 4, 16, 16), masks=(1, 2, 3), mask=(1, 1, 16, 16), noises=1, outputs=(F32, F16)),
    Step("mask, some rows, by tokens", shape=(2, 6, 8), masks=(2,), mask=(1, 6, 8), noises=1, rows=3, row="tokens"),
    # bank, clip, scale
    Step("a steering vector", bank=1, noises=1),
    Step("16 steering vectors of float16, two outputs", bank=16, bank_dtype=F16, outputs=(F32, F16), shape=(3, 45), density=0.5),
    Step("clip", clip=_CLIP, ring=1),
    Step("clip for each sample", clip="sample", shape=(4, 31), rows=2, row="batch"),
    Step("clip without bounds", clip=(-np.inf, np.inf, 1), special=0.1),
    Step("clip at 0, which leaves -0", shape=(3, 111), inputs=(F32,), clip=(0.0, 1, 1), special=0.4, density=0),
    Step("clip at -0, which leaves 0", shape=(3, 111), inputs=(F32,), clip=(-1, -0.0, 1), special=0.4, density=0),
    Step("scale", scale=True, ring=2, noises=1, rows=2, shape=(4, 29), row="batch"),
    # specials
    *(Step(f"specials, {dtype}", shape=(3, 333), inputs=(dtype, dtype), outputs=(F32, F16, BF16), special=0.3, noises=1)
      for dtype in (F32, F16, BF16)),
    Step("specials, clip", shape=(3, 111), special=0.3, clip=_CLIP, ring=1, ring_dtype=BF16),
    Step("specials, mask", special=0.3, masks=(0, 1, 2), mask=(2, 1, 5, 7), noises=1),
    Step("specials, no status", shape=(3, 111), special=0.3, status=None),
    Step("specials, a ring slot and no output", shape=(3, 111), special=0.3, ring=1, outputs=()),
    Step("specials, rows in any order", shape=(6, 40), rows=5, row="batch", special=0.3),
    Step("specials, an earlier NaN and a flag", shape=(2, 40), rows=5, row="batch", special=0.3, status=(0, 2)),
    # all at once, and large
    Step("everything", shape=(3, 4, 5, 6), inputs=(F32, F16, BF16, f"{F32} strided", f"{F16} channels_last", f"{BF16} offset"),
         outputs=(F32, "=1", f"{BF16} channels_last"), ring=3, rows=5, row="batch", noises=4, bank=3, clip="sample",
         masks=(0, 1, 2, 3, 4), mask=(3, 1, 5, 6), scale=True, density=0.6),
    Step("everything, at the limits", shape=(2, 37), inputs=(F32,) * 8, outputs=(F32, F16, BF16), ring=4, ring_dtype=F16, rows=2,
         row="scalar", noises=16, bank=16, clip=_CLIP, masks=(0, 1, 2, 3, 4), mask=(1, 37), scale=True, special=0.02),
    Step("several tiles, float32", shape=(2, 4099), noises=1),
    Step("several tiles, float16", shape=(2, 8200), inputs=(F16, F16), outputs=(F16,), noises=1,
         slow=("triton-interpreted",)),
    Step("70000 samples, a folded grid", shape=(70000, 3), inputs=(F16,), outputs=(F32,), rows=2, row="batch",
         slow=("triton-interpreted", "reference")),
]


def step_cases() -> list[Case]:
    return [Case(f"step_/{step.name}", "step_", lambda step=step: _build(step), _run, step.slow) for step in STEPS]


_ORDER = ("inputs", "outputs", "ring", "coef", "meta", "row", "row_index", "keys", "scale", "bank", "bank_index", "bank_weight",
          "clip", "known", "mask", "status")


def _run(ops, a, device):
    ops.step_(*(a[name] for name in _ORDER))
    written = {f"outputs[{i}]": y for i, y in enumerate(a["outputs"])} | {f"inputs[{k}]": v for k, v in enumerate(a["inputs"])}
    return written | {name: a[name] for name in ("ring", "status") if a[name] is not None}


def _build(step: Step) -> dict:
    """The arguments of ``step_``, by name."""
    draw = Draw(f"step_/{step.name}")
    shape, B, R, M, J, N = step.shape, step.shape[0], step.ring, step.bank, step.noises, step.rows
    inputs = [draw.tensor(shape, *kind.split(), special=step.special) for kind in step.inputs]
    outputs = [inputs[int(kind[1:])] if kind[0] == "=" else draw.tensor(shape, *kind.split()) for kind in step.outputs]
    ring = draw.tensor((R * B, *shape[1:]), step.ring_dtype).view(R, *shape) if R else None

    layout = reference.Layout(len(inputs) + R, len(outputs), M, J)
    coef = draw.coefficients((N, layout.width), step.density)
    if step.density == 0:
        coef[:, [0, *(layout.y(i) + layout.inputs for i in range(len(outputs)))]] = 1
    meta = np.full((N, 4), -1, np.int32)
    meta[:, 1] = 0
    if R:
        meta[:, 0] = (np.arange(N) + int(draw.integers(0, R, ()))) % R
    if step.clip:
        meta[:, 1] |= CLIP
        coef[:, layout.clip : layout.clip + 3] = _CLIP if step.clip == "sample" else step.clip
    if step.masks:
        for r in range(N):  # row 0 has all of them, the others leave some out
            for target in step.masks[r % 2 :] if r else step.masks:
                meta[r, 1] |= MASK_INPUT << target
        meta[:, 2] = draw.integers(0, layout.inputs, (N,))
        meta[:, 3] = draw.integers(0, J, (N,)) if J else -1
        if not J:
            coef[:, layout.mask + 1 :: 2] = 0

    keys = None
    if J:
        keys = draw.keys(1 if step.keys == "shared" else N, J, B)
        if step.keys == "edges":
            keys[..., 1] = np.resize(np.array(EDGES, np.int64), B)
        keys = torch.from_numpy(keys)
    size = {"int": None, "scalar": (), "batch": (B,), "tokens": (B, shape[1] if len(shape) > 1 else 1)}[step.row]
    row = None if size is None else torch.from_numpy(np.asarray(draw.integers(0, N, size)))
    if step.row in ("scalar", "tokens"):
        row = row.to(torch.int32)
    mask = known = None
    if step.masks:
        weights = draw.integers(0, 9, step.mask).astype(np.float32) / np.float32(8)  # in eighths: 0 and 1 among them
        mask = torch.from_numpy(weights).to(getattr(torch, step.mask_dtype))
        known = draw.tensor(shape, *step.known.split(), special=step.special)
    return {
        "inputs": inputs, "outputs": outputs, "ring": ring,
        "coef": torch.from_numpy(np.ascontiguousarray(coef)), "meta": torch.from_numpy(meta),
        "row": row, "row_index": 0 if N == 1 else int(draw.integers(0, N, ())), "keys": keys,
        "scale": torch.from_numpy(draw.coefficients((B, layout.inputs), 0.9)) if step.scale else None,
        "bank": draw.tensor((3, *shape[1:]), step.bank_dtype) if M else None,
        "bank_index": torch.from_numpy(draw.integers(0, 3, (B, M))) if M else None,
        "bank_weight": torch.from_numpy(draw.coefficients((B, M), 0.8)) if M else None,
        "clip": torch.from_numpy(np.sort(draw.values((B, 3)), axis=1)) if step.clip == "sample" else None,
        "known": known, "mask": mask,
        "status": torch.tensor(step.status, dtype=torch.int32) if step.status else None,
    }
