"""The launches that have a budget: steps of real samplers on latents (2, 4, 64, 64), edits of activations (2, 128, 16, 16),
projections, quantiles of a sum of two latents, noise, keys.

The tensors of a workload are those with a value for each element: they decide what the launch costs. The table, the keys of
the noise and the indices are the rest.
"""

from typing import NamedTuple

import torch

import fastdiff as fd
from cases import DTYPES, Case
from fastdiff.reference import Layout
from fastdiff.reference.step import MASK_D
from proof import draw
from proof.execute import written

SHAPE = (2, 4, 64, 64)
ACTIVATION = (2, 128, 16, 16)
RAGGED = (2, 3, 63, 65)
LAUNCHES = {"edit_": 2, "quantile_": 5}  # of an op that takes more than one
ROW = 3  # of six steps: everything that a sampler uses is in use


class Workload(NamedTuple):
    op: str
    args: tuple
    written: list  # what may be written, besides what the op returns
    tensors: list  # with a value for each element, besides what the op returns
    elements: int  # 0: those of what the op returns
    launch: int = 0  # which one of the op's


def keys(i, count):
    """Those of proof.draw in memory of torch, which begins at a whole sector, as a GPU's does."""
    return draw.keys(i, count).clone()


def _values(shape, dtype, layout=torch.contiguous_format):
    data = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return data.contiguous(memory_format=layout) if len(shape) == 4 else data


def _step(dtype, *, sampler="ddpm", shape=SHAPE, mixed=False, layout=torch.contiguous_format, bank=0, masked=False,
          tokens=0):
    """Row ROW of a sampler, as a run would launch it. mixed: the base in float32 beside a model in ``dtype``; bank: steering
    terms in d; masked: inpainting with a mask for all channels; tokens: each with a row of its own, all at ROW."""
    plan = fd.plan(sampler, schedule="scaled_linear", steps=6)
    base = torch.float32 if mixed else dtype
    plan = plan.with_model_dtype(dtype) if mixed else plan
    buffers = {slot: _values(shape, dtype if slot in ("out", "in") else base, layout)
               for slot in dict.fromkeys((*plan.inputs, *plan.outputs))}
    coef, meta = (torch.from_numpy(table).clone() for table in plan.table())
    if bank:  # the same row with columns for steering
        old, new = plan.layout, Layout(len(plan.slots), len(plan.outputs), bank, plan.noises)
        wide = torch.zeros(len(coef), new.width)
        wide[:, : old.inputs], wide[:, old.inputs : old.inputs + bank] = coef[:, : old.inputs], 0.5
        wide[:, new.clip : new.clip + 3] = coef[:, old.clip : old.clip + 3]
        for i in range(old.outputs):
            wide[:, new.y(i) : new.y(i) + old.inputs + 1] = coef[:, old.y(i) : old.y(i) + old.inputs + 1]
            wide[:, new.y(i) + old.inputs + 1 + bank : new.y(i + 1)] = coef[:, old.y(i) + old.inputs + 1 : old.y(i + 1)]
        coef = wide
    if masked:
        columns = Layout(len(plan.slots), len(plan.outputs), bank, plan.noises)
        coef[:, columns.mask + 2] = 1.0  # k0 of d: the known image as it is
        meta[:, 1] |= MASK_D
    case = Case([buffers[slot] for slot in plan.inputs], [buffers[slot] for slot in plan.outputs],
                _values((plan.ring, *shape), base) if plan.ring else None, coef, meta,
                torch.full((shape[0], tokens), ROW, dtype=torch.int64) if tokens else None, 0 if tokens else ROW,
                keys(0, len(plan) * plan.noises * shape[0]).reshape(len(plan), plan.noises, shape[0], 2) if plan.noises else None,
                bank=_values((5, *shape[1:]), dtype, layout) if bank else None,
                bank_index=torch.arange(shape[0] * bank, dtype=torch.int32).reshape(shape[0], bank) % 5 if bank else None,
                bank_weight=torch.ones(shape[0], bank) if bank else None,
                known=_values(shape, dtype, layout) if masked else None,
                mask=(_values((1, 1, *shape[2:]), dtype) > 0).to(dtype) if masked else None,
                status=torch.tensor([2**31 - 1, 0], dtype=torch.int32))
    each = [*case.inputs, *case.outputs, *(t for t in (case.ring, case.bank, case.known, case.mask) if t is not None)]
    return Workload("step_", case.args(), written(case), each, case.sample.numel())


def _edit(dtype, launch, *, shape=ACTIVATION, terms=1, layout=torch.contiguous_format):
    """edit_ in place, each sample by vectors of its own. launch: 0 the sums of squares, 1 the edit."""
    h, bank = _values(shape, dtype, layout), _values((shape[0] * terms, *shape[1:]), torch.float32, layout)
    index = torch.arange(len(bank), dtype=torch.int32).reshape(shape[0], terms)
    args = (h, h, bank, index, torch.full(index.shape, 0.5))
    return Workload("edit_", args, [h], [h] if launch == 0 else [h, bank], h.numel(), launch)


def _name(dtype):
    return next(name for name, d in DTYPES.items() if d == dtype)


def _normal(dtype):
    out = torch.zeros(SHAPE, dtype=dtype)
    return Workload("normal_", (out, keys(0, len(out))), [out], [out], out.numel())


def _project(dtype, vectors):
    """An element is a product: one of a sample's with that of one vector."""
    x, basis = _values(SHAPE, dtype), _values((vectors, *SHAPE[1:]), torch.float32)
    out, gain = torch.zeros(len(x), vectors), torch.full((1, vectors), 0.5)
    args = (out, x, basis, None, gain, torch.zeros_like(gain), torch.ones_like(out), None, 0)
    return Workload("project_", args, [out], [x, basis], x.numel() * vectors)


def _quantile(dtype, launch, *, shape=SHAPE, layout=torch.contiguous_format):
    """quantile_ of a sum of two. launch: 0 to 3 the counts of a digit, each with what the digits before have found; 4 the result."""
    inputs = [_values(shape, dtype, layout), _values(shape, dtype, layout).neg()]
    out, clip = torch.zeros(shape[0]), torch.zeros(shape[0], 3)
    args = (out, clip, inputs, torch.tensor([[1.25, 0.25]]), None, 0, None, 0.995, 1.0, 9.0)
    counts = launch < LAUNCHES["quantile_"] - 1
    return Workload("quantile_", args, [out, clip], inputs if counts else [out, clip], inputs[0].numel() if counts else len(out), launch)


def _lift(vectors):
    out, basis = torch.zeros(SHAPE), _values((vectors, *SHAPE[1:]), torch.float32)
    return Workload("lift_", (out, basis, None, torch.ones(len(out), vectors)), [out], [out, basis], out.numel())


def _ops():
    """{"name, dtype": (op, function that makes the Workload)}"""
    f32, f16, bf16 = DTYPES.values()
    made = {}

    def add(op, name, dtype, function, *args, **options):
        made[f"{name}, {_name(dtype)}"] = op, lambda: function(*args, **options)

    def step(name, dtype, **options):
        add("step_", name, dtype, _step, dtype, **options)

    for sampler in ("ddim", "ddpm"):
        for dtype in (f32, f16, bf16):
            step(sampler, dtype, sampler=sampler)
    for dtype in (f32, f16):
        step("dpmpp_2m_sde", dtype, sampler="dpmpp_2m_sde")
    step("mixed dtypes", f16, mixed=True)
    step("2 steering vectors", f16, bank=2)
    step("inpainting", f16, masked=True)
    step("rows by token", f16, shape=(2, 256, 64), tokens=256)
    step("ragged", f16, shape=RAGGED)
    step("channels-last", f32, layout=torch.channels_last)
    for dtype in (f32, f16, bf16):
        add("normal_", "normal", dtype, _normal, dtype)
    for dtype in (f32, f16, bf16):
        add("edit_", "norm", dtype, _edit, dtype, 0)
        add("edit_", "edit", dtype, _edit, dtype, 1)
    for what, options in (("channels-last", {"layout": torch.channels_last}), ("ragged", {"shape": (2, 61, 15, 17)})):
        add("edit_", f"norm {what}", f16, _edit, f16, 0, **options)
        add("edit_", f"edit {what}", f16, _edit, f16, 1, **options)
    add("edit_", "edit with 2 vectors", f16, _edit, f16, 1, terms=2)
    for dtype in (f32, f16):
        add("project_", "project on 16 vectors", dtype, _project, dtype, 16)
    add("lift_", "lift 16 vectors", f32, _lift, 16)

    for dtype in (f32, f16, bf16):
        add("quantile_", "first digit", dtype, _quantile, dtype, 0)
    for dtype in (f32, f16):
        add("quantile_", "last digit", dtype, _quantile, dtype, 3)
    add("quantile_", "second digit ragged", f16, _quantile, f16, 1, shape=RAGGED)
    add("quantile_", "second digit channels-last", f32, _quantile, f32, 1, layout=torch.channels_last)
    add("quantile_", "quantile", f32, _quantile, f32, 4)

    def key_op(op, args, tensors):
        made[f"{op}, int64"] = op, lambda: Workload(op, args, [], tensors, 0)

    many, data = keys(0, 4096), torch.arange(4096)
    seeds, streams, draws = many[:64, 0].contiguous(), *(t.clone() for t in keys(1, 64).reshape(2, 64, 1))
    key_op("fold_in", (many, data), [many, data])
    key_op("run_keys", (seeds, streams, draws), [])
    key_op("raw_words", (many[:2], 16384), [])
    return made


def workloads(ops=None):
    """{"name, dtype": function that makes the Workload} of some ops, None for all."""
    return {name: function for name, (op, function) in _ops().items() if ops is None or op in ops}
