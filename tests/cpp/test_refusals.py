"""Wrong input to step_: each raises before anything is written, and says what was given and what is taken."""

import dataclasses

import numpy as np
import pytest
import torch
from cases import Case

from fastdiff import reference

B, SHAPE, K, R, O, N, J, M, V = 2, (3, 4, 5), 2, 2, 2, 3, 2, 2, 4
LAYOUT = reference.Layout(K + R, O, M, J)


def good():
    """A case that uses every argument and is taken."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape):
        return torch.randn(shape, generator=generator)

    coef = new(N, LAYOUT.width)
    meta = torch.tensor([[0, 1 | 4, 0, 0], [1, 2 | 16, 1, 1], [-1, 8, 0, 0]], dtype=torch.int32)
    return Case(
        [new(B, *SHAPE) for _ in range(K)], [new(B, *SHAPE) for _ in range(O)], new(R, B, *SHAPE), coef, meta,
        torch.tensor([1, 2]), 0, torch.arange(N * J * B * 2).reshape(N, J, B, 2), new(B, K + R), new(V, *SHAPE),
        torch.tensor([[0, 3], [1, 2]]), new(B, M), new(B, 3), new(B, *SHAPE), new(B, 1, 4, 5),
        torch.tensor([2**31 - 1, 0], dtype=torch.int32))


def change(**values):
    return lambda case: dataclasses.replace(case, **{k: v(case) if callable(v) else v for k, v in values.items()})


def put(name, index, value):
    def apply(case):
        getattr(case, name)[index] = value
        return case

    return apply


whole = torch.zeros

WRONG = {
    "no output": (change(outputs=[], ring=None), "outputs is empty", "nothing to write"),
    "four outputs": (change(outputs=lambda c: [torch.zeros_like(c.inputs[0]) for _ in range(4)]), "4 tensors", "at most 3"),
    "thirteen inputs": (change(inputs=lambda c: [c.inputs[0]] * 13), "13 tensors", "at most 12"),
    "inputs and slots": (change(inputs=lambda c: [c.inputs[0]] * 11), "11 tensors and ring 2 slots", "at most 12"),
    "input shape": (change(inputs=lambda c: [c.inputs[0], whole(B, 3, 4, 6)]), "inputs[1] has shape (2, 3, 4, 6), outputs[0] has (2, 3, 4, 5)", "one shape"),
    "input batch": (change(inputs=lambda c: [c.inputs[0], whole(1, *SHAPE)]), "inputs[1] has shape (1, 3, 4, 5)", "one shape"),
    "output shape": (change(outputs=lambda c: [c.outputs[0], whole(B, 60)]), "outputs[1] has shape (2, 60)", "one shape"),
    "input dtype": (change(inputs=lambda c: [c.inputs[0], c.inputs[1].double()]), "inputs[1] is float64", "float32, float16 or bfloat16"),
    "output dtype": (change(outputs=lambda c: [c.outputs[0], c.outputs[1].int()]), "outputs[1] is int32", "float32, float16 or bfloat16"),
    "no batch": (change(outputs=[whole(())], inputs=[], ring=None), "outputs[0] has shape ()", "(batch, *shape)"),
    "transposed": (change(inputs=lambda c: [c.inputs[0], whole(B, 3, 5, 4).transpose(2, 3)]), "strides (60, 20, 1, 4)", "contiguous or channels-last"),
    "every other": (change(outputs=lambda c: [c.outputs[0], whole(B, 3, 4, 10)[..., ::2]]), "strides (120, 40, 10, 2)", "dense"),
    "expanded output": (change(outputs=lambda c: [c.outputs[0], whole(1, *SHAPE).expand(B, *SHAPE)]), "outputs[1] overlaps itself", "0 apart"),
    "outputs alike": (change(outputs=lambda c: [c.outputs[0], c.outputs[0]]), "outputs[0] overlaps outputs[1]", "only an input"),
    "output in ring": (change(outputs=lambda c: [c.outputs[0], c.ring[1]]), "outputs[1] overlaps ring", "only exactly"),
    "partial overlap": (lambda c: (lambda s: change(inputs=[c.inputs[0], s[:120].view(B, *SHAPE)], outputs=[c.outputs[0], s[1:].view(B, *SHAPE)])(c))(whole(121)),
                        "outputs[1] overlaps inputs[1]", "only exactly"),
    "other order": (lambda c: (lambda s: change(inputs=[c.inputs[0], s], outputs=[c.outputs[0], s.view(B, 4, 5, 3).permute(0, 3, 1, 2)])(c))(whole(B, *SHAPE)),
                    "outputs[1] overlaps inputs[1]", "only exactly"),
    "output in bank": (lambda c: change(outputs=[c.outputs[0], c.bank[1:3]])(c), "outputs[1] overlaps bank", "only exactly"),
    "output in mask": (lambda c: (lambda s: change(mask=s[:, :1], outputs=[c.outputs[0], s])(c))(whole(B, *SHAPE)), "overlaps mask", "only exactly"),
    "ring shape": (change(ring=whole(R, B, 3, 4, 4)), "ring has shape (2, 2, 3, 4, 4)", "(slots, batch, *shape)"),
    "ring overlaps": (change(ring=whole(1, B, *SHAPE).expand(R, B, *SHAPE)), "ring overlaps ring", "only an input"),
    "coef width": (change(coef=whole(N, LAYOUT.width + 1)), f"coef has {LAYOUT.width + 1} columns", f"take {LAYOUT.width}"),
    "coef dtype": (change(coef=lambda c: c.coef.double()), "coef is float64", "float32"),
    "coef empty": (change(coef=whole(0, LAYOUT.width), meta=lambda c: c.meta[:0]), f"(0, {LAYOUT.width})", "at least one row"),
    "coef strides": (change(coef=lambda c: c.coef.t().contiguous().t()), "coef of shape", "contiguous"),
    "meta shape": (change(meta=lambda c: c.meta[:2]), "meta has shape (2, 4)", "(rows, 4) = (3, 4)"),
    "meta dtype": (change(meta=lambda c: c.meta.long()), "meta is int64", "int32"),
    "row shape": (change(row=torch.zeros(3, dtype=torch.int64)), "row has shape (3,)", "(batch,)"),
    "tokens": (change(row=torch.zeros(B, 4, dtype=torch.int64)), "row has shape (2, 4)", "first dimension of a sample"),
    "row dtype": (change(row=whole(B)), "row is float32", "int32 or int64"),
    "row beyond": (change(row=torch.tensor([0, 3])), "row holds 3 for sample 1", "0 to 2"),
    "row below": (change(row=torch.tensor(-1)), "row holds -1", "0 to 2"),
    "row_index": (change(row=None, row_index=3), "row_index is 3", "0 to 2"),
    "row_index below": (change(row=None, row_index=-1), "row_index is -1", "0 to 2"),
    "keys shape": (change(keys=torch.zeros(2, J, B, 2, dtype=torch.int64)), "keys has shape (2, 2, 2, 2)", "(3 or 1, 0 to 16, 2, 2)"),
    "keys dtype": (change(keys=lambda c: c.keys.int()), "keys is int32", "int64"),
    "keys strides": (change(keys=lambda c: c.keys.transpose(2, 3).contiguous().transpose(2, 3)), "keys has strides", "stride 1"),
    "keys missing": (change(keys=None), f"coef has {LAYOUT.width} columns", "0 noise terms"),
    "scale shape": (change(scale=whole(B, K)), "scale has shape (2, 2)", "(2, 4)"),
    "scale dtype": (change(scale=lambda c: c.scale.half()), "scale is float16", "float32"),
    "bank alone": (change(bank_index=None), "given bank bank_weight", "go together"),
    "bank shape": (change(bank=whole(V, 60)), "bank has shape (4, 60)", "(vectors, *shape)"),
    "bank index shape": (change(bank_index=torch.zeros(1, M, dtype=torch.int64)), "bank_index has shape (1, 2)", "(2, 0 to 16)"),
    "bank index dtype": (change(bank_index=whole(B, M)), "bank_index is float32", "int32 or int64"),
    "bank weight shape": (change(bank_weight=whole(B, 3)), "bank_weight has shape (2, 3)", "(2, 2)"),
    "bank index beyond": (put("bank_index", (1, 0), V), "bank_index[1, 0] is 4", "0 to 3"),
    "bank index below": (put("bank_index", (0, 1), -1), "bank_index[0, 1] is -1", "0 to 3"),
    "clip shape": (change(clip=whole(B, 2)), "clip has shape (2, 2)", "(2, 3)"),
    "known shape": (change(known=whole(B, 3, 4, 4)), "known has shape (2, 3, 4, 4)", "one shape"),
    "known missing": (change(known=None), "known is None", "row 1"),
    "mask shape": (change(mask=whole(B, 3, 1, 5)), "mask has shape (2, 3, 1, 5)", "trailing dimensions"),
    "mask batch": (change(mask=whole(3, 1, 4, 5)), "mask has shape (3, 1, 4, 5)", "batch or 1"),
    "mask missing": (change(mask=None), "mask flag (18)", "mask is None"),
    "mask noise": (put("meta", (1, 3), 2), "noise term 2", "2 noise terms"),
    "masked input": (put("meta", (1, 2), 4), "masks input 4", "0 to 3"),
    "ring slot": (put("meta", (1, 0), 2), "ring slot 2", "2 slots"),
    "flags": (put("meta", (2, 1), 32), "flags 32", "with 2 outputs"),
    "status shape": (change(status=torch.zeros(1, dtype=torch.int32)), "status has shape (1,)", "(2,)"),
    "status dtype": (change(status=torch.zeros(2, dtype=torch.int64)), "status is int64", "int32"),
    "sparse": (change(inputs=lambda c: [c.inputs[0], c.inputs[1].to_sparse()]), None, None),
}


def test_the_good_case_is_taken(ops):
    ops.step_(*good().args())


@pytest.mark.parametrize("name", WRONG)
def test_refused(ops, name):
    apply, given, taken = WRONG[name]
    case = apply(good())
    tensors = [t for _, value in case.items() for t in (value if isinstance(value, list) else [value]) if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    with pytest.raises((ValueError, NotImplementedError) if given is None else ValueError) as error:
        ops.step_(*case.args())
    assert given is None or given in str(error.value) and taken in str(error.value), str(error.value)
    for t, old in zip(tensors, before):
        assert t.is_sparse or torch.equal(t, old)


def test_unused_rows_are_not_looked_at(ops):
    """A bad row that no sample uses, and a bank index that has no weight, do no harm."""
    case = put("meta", (0, 0), 99)(good())
    case.bank_index[0, 1], case.bank_weight[0, 1] = -1, 0
    case.coef[1:, LAYOUT.inputs + 1] = 1
    ops.step_(*case.args())


def test_interleaved_outputs_and_inputs(ops):
    """Halves of one buffer alternate in memory without overlapping: a model output that is split by chunk()."""
    both = torch.randn(B, 6, 4, 5)
    x, y = both.chunk(2, dim=1)
    case = change(inputs=lambda c: [c.inputs[0], x], outputs=lambda c: [c.outputs[0], y])(good())
    old = x.clone()
    ops.step_(*case.args())
    assert torch.equal(x, old)


def test_handles_are_released(ops):
    """Neither a step nor a refusal keeps a tensor alive."""

    def uses(case):
        return [t._use_count() for _, value in case.items() for t in (value if isinstance(value, list) else [value])
                if isinstance(t, torch.Tensor)]

    for apply in (lambda c: c, WRONG["input shape"][0], WRONG["thirteen inputs"][0], WRONG["row beyond"][0]):
        case = apply(good())
        before = uses(case)
        try:
            ops.step_(*case.args())
        except ValueError:
            pass
        assert uses(case) == before


def test_messages_name_the_op(ops):
    with pytest.raises(ValueError, match="^step_: "):
        ops.step_(*change(clip=np.float32(0) * torch.zeros(B, 2))(good()).args())
