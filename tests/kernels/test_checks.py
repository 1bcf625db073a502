"""What step_ and its neighbours refuse before any work, and that the message holds what was given and what is taken."""

import pytest
import torch

from fastdiff.checks import check_fold_in, check_normal, check_raw_words, check_run_keys, check_step
from fastdiff.reference import Layout

B, SHAPE, ROWS = 2, (3, 4, 4), 5
NAMES = ("inputs", "outputs", "ring", "coef", "meta", "row", "row_index", "keys", "scale", "bank", "bank_index", "bank_weight", "clip",
         "known", "mask", "status")


def valid(**changes):
    """Arguments of a step with everything in it."""
    data = torch.zeros
    args = dict(
        inputs=[data(B, *SHAPE), data(B, *SHAPE, dtype=torch.float16)], outputs=[data(B, *SHAPE), data(B, *SHAPE, dtype=torch.bfloat16)],
        ring=data(2, B, *SHAPE), coef=data(ROWS, Layout(4, 2, 2, 3).width), meta=data(ROWS, 4, dtype=torch.int32),
        row=data(B, dtype=torch.int64), row_index=0, keys=data(ROWS, 3, B, 2, dtype=torch.int64), scale=data(B, 4), bank=data(6, *SHAPE),
        bank_index=data(B, 2, dtype=torch.int32), bank_weight=data(B, 2), clip=data(B, 3), known=data(B, *SHAPE),
        mask=data(1, 1, 4, 4), status=torch.tensor([2**31 - 1, 0], dtype=torch.int32))
    args.update(changes)
    return [args[name] for name in NAMES]


zeros, whole = torch.zeros, (B, *SHAPE)
shared = torch.zeros(B, *SHAPE)
wide = torch.zeros(B, 6, 4, 4)
REFUSED = {
    "shape of an input": (dict(inputs=[zeros(B, 3, 4, 5), zeros(whole)]), ["inputs[0]", "(2, 3, 4, 5)", "(2, 3, 4, 4)"]),
    "batch of an output": (dict(outputs=[zeros(whole), zeros(3, *SHAPE)]), ["outputs[1]", "(3, 3, 4, 4)", "(2, 3, 4, 4)"]),
    "dtype of an input": (dict(inputs=[zeros(whole), zeros(whole, dtype=torch.float64)]), ["inputs[1]", "float64", "bfloat16"]),
    "device of an input": (dict(inputs=[zeros(whole), zeros(whole, device="meta")]), ["inputs[1]", "meta", "cpu"]),
    "too many inputs": (dict(inputs=[zeros(whole)] * 13), ["13", "12"]),
    "too many outputs": (dict(outputs=[zeros(whole)] * 4), ["4", "3"]),
    "too many slots": (dict(inputs=[zeros(whole)] * 11), ["11", "2 slots", "12"]),
    "nothing to write": (dict(outputs=[], ring=None), ["nothing to write"]),
    "holes in a sample": (dict(inputs=[zeros(B, 3, 4, 8)[..., ::2], zeros(whole)]), ["inputs[0]", "(96, 32, 8, 2)", "channels-last"]),
    "shape of the ring": (dict(ring=zeros(2, B, 3, 4, 5)), ["ring", "(2, 2, 3, 4, 5)", "(2, 3, 4, 4)"]),
    "width of coef": (dict(coef=zeros(ROWS, 7)), ["7 columns", "4 inputs", str(Layout(4, 2, 2, 3).width)]),
    "dtype of coef": (dict(coef=zeros(ROWS, Layout(4, 2, 2, 3).width, dtype=torch.float64)), ["coef", "float64", "float32"]),
    "strides of coef": (dict(coef=zeros(Layout(4, 2, 2, 3).width, ROWS).t()), ["coef", "contiguous"]),
    "shape of meta": (dict(meta=zeros(4, 4, dtype=torch.int32)), ["meta", "(4, 4)", "(5, 4)"]),
    "dtype of meta": (dict(meta=zeros(ROWS, 4, dtype=torch.int64)), ["meta", "int64", "int32"]),
    "shape of row": (dict(row=zeros(3, dtype=torch.int64)), ["row", "(3,)", "(batch,)"]),
    "tokens of row": (dict(row=zeros(B, 4, dtype=torch.int64)), ["row", "(2, 4)", "first dimension"]),
    "dtype of row": (dict(row=zeros(B)), ["row", "float32", "int64"]),
    "row beyond the table": (dict(row=torch.tensor([0, 5])), ["row holds 0 to 5", "0 to 4"]),
    "negative row": (dict(row=torch.tensor([-1, 0], dtype=torch.int32)), ["-1", "0 to 4"]),
    "row_index beyond the table": (dict(row=None, row_index=5), ["row_index is 5", "0 to 4"]),
    "rows of keys": (dict(keys=zeros(4, 3, B, 2, dtype=torch.int64)), ["keys", "(4, 3, 2, 2)", "5 or 1"]),
    "batch of keys": (dict(keys=zeros(1, 3, 3, 2, dtype=torch.int64)), ["keys", "(1, 3, 3, 2)"]),
    "too many noise terms": (dict(keys=zeros(1, 17, B, 2, dtype=torch.int64)), ["keys", "17", "16"]),
    "dtype of keys": (dict(keys=zeros(1, 3, B, 2, dtype=torch.int32)), ["keys", "int32", "int64"]),
    "pairs that are not dense": (dict(keys=zeros(1, 3, B, 4, dtype=torch.int64)[..., ::2]), ["keys", "stride 1"]),
    "shape of scale": (dict(scale=zeros(B, 3)), ["scale", "(2, 3)", "(2, 4)"]),
    "a bank without weights": (dict(bank_weight=None), ["bank_weight", "together", "given bank bank_index"]),
    "shape of the bank": (dict(bank=zeros(6, 3, 4, 5)), ["bank", "(6, 3, 4, 5)", "(vectors, *shape)"]),
    "terms of the bank": (dict(bank_weight=zeros(B, 3)), ["bank_weight", "(2, 3)", "(2, 2)"]),
    "bank_index beyond the bank": (dict(bank_index=torch.tensor([[0, 6], [0, 0]]), bank_weight=torch.ones(B, 2), coef=torch.ones(ROWS, Layout(4, 2, 2, 3).width)),
                                   ["bank_index[0, 1] is 6", "0 to 5"]),
    "shape of clip": (dict(clip=zeros(B, 2)), ["clip", "(2, 2)", "(2, 3)"]),
    "shape of known": (dict(known=zeros(B, 3, 4, 1)), ["known", "(2, 3, 4, 1)"]),
    "shape of the mask": (dict(mask=zeros(1, 3, 1, 4)), ["mask", "(1, 3, 1, 4)", "trailing"]),
    "dtype of the mask": (dict(mask=zeros(1, 1, 4, 4, dtype=torch.bool)), ["mask", "bool", "float32"]),
    "shape of status": (dict(status=zeros(3, dtype=torch.int32)), ["status", "(3,)", "(2,)"]),
    "an output that is half an input": (dict(inputs=[zeros(3, *SHAPE)[:B], zeros(whole)], outputs=None), ["outputs[0]", "inputs[0]", "exactly"]),
    "an output of another dtype in an input's place": (dict(inputs=[shared, zeros(whole)],
                                                             outputs=[shared.view(torch.float16)[..., :4].as_strided(whole, (48, 16, 4, 1)),
                                                                      zeros(whole)]), ["outputs[0]", "inputs[0]"]),
    "two outputs in one place": (dict(outputs=[shared, shared]), ["outputs[0]", "outputs[1]"]),
    "an output that is expanded": (dict(outputs=[zeros(1, *SHAPE).expand(whole), zeros(whole)]), ["outputs[0]", "overlaps itself", "48"]),
}


def test_an_index_that_no_weight_uses_may_be_anything():
    check_step(*valid(bank_index=torch.tensor([[0, 6], [0, -1]])))


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    changes, parts = REFUSED[what]
    changes = dict(changes)
    if changes.get("outputs", ()) is None:  # the same storage, one sample on
        storage = changes["inputs"][0]
        changes["outputs"] = [storage.as_strided(whole, storage.stride(), 48), zeros(whole)]
    with pytest.raises(ValueError) as error:
        check_step(*valid(**changes))
    message = str(error.value)
    assert message.startswith("step_: ") and all(part in message for part in parts), message


@pytest.mark.parametrize("changes", [
    {},
    dict(inputs=[shared, zeros(whole)], outputs=[shared, zeros(whole)]),  # in place
    dict(inputs=[wide[:, :3], wide[:, 3:]]),  # halves of one tensor
    dict(inputs=[wide[:, :3], zeros(whole)], outputs=[wide[:, 3:], zeros(whole)]),  # interleaved, without a common element
    dict(inputs=[zeros(1, *SHAPE).expand(whole), zeros(whole).contiguous(memory_format=torch.channels_last)]),
    dict(row=None, row_index=4),
    dict(row=torch.tensor([[0, 1, 4], [2, 3, 0]], dtype=torch.int32)),
    dict(mask=zeros(B, *SHAPE), scale=zeros(4, B).t()),
])  # fmt: skip
def test_taken(changes):
    check_step(*valid(**changes))


def test_the_other_ops():
    long = dict(dtype=torch.int64)
    for call, parts in [
        (lambda: check_normal(zeros(2, 3), zeros(3, 2, **long)), ["keys", "(3, 2)", "(2, 2)"]),
        (lambda: check_normal(zeros(2, 3, dtype=torch.float64), zeros(2, 2, **long)), ["out", "float64", "bfloat16"]),
        (lambda: check_normal(zeros(1, 3).expand(2, 3), zeros(2, 2, **long)), ["out", "overlaps itself"]),
        (lambda: check_fold_in(zeros(2, 3, **long), zeros(2, **long)), ["keys", "(2, 3)", "(..., 2)"]),
        (lambda: check_fold_in(zeros(2, 2, **long), zeros(3, **long)), ["data", "(3,)", "(2,)"]),
        (lambda: check_run_keys(zeros(2), zeros(1, 1, **long), zeros(1, 1, **long)), ["seeds", "float32", "int64"]),
        (lambda: check_run_keys(zeros(2, **long), zeros(1, 2, **long), zeros(1, 1, **long)), ["(1, 2)", "(1, 1)"]),
        (lambda: check_raw_words(zeros(2, 3, **long), 4), ["keys", "(2, 3)"]),
        (lambda: check_raw_words(zeros(2, 2, **long), -1), ["count", "-1"]),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert all(part in str(error.value) for part in parts), str(error.value)
