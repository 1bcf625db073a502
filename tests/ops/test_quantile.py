"""quantile_ as torch sees it, and what it refuses: each refusal by the C++ code (or whatever is in use) and by the checks that the
other backends share."""

import random

import pytest
import torch
from quantile_cases import random_quantile_case

from fastdiff.quantile_checks import check_quantile

OPS = torch.ops.fastdiff
B, SHAPE, K, N = 2, (3, 4, 4), 2, 3
new, whole = torch.zeros, (B, *SHAPE)
storage = torch.zeros(1000)


def good(**changes):
    """Arguments that are taken."""
    args = dict(out=new(B), clip=new(B, 3), inputs=[new(whole), new(whole, dtype=torch.float16)], coef=torch.ones(N, K),
                row=new(B, dtype=torch.int32), row_index=0, scale=torch.ones(B, K), q=0.9, low=1.0, high=2.0)
    unknown = changes.keys() - args.keys()
    assert not unknown, unknown
    args.update(changes)
    return tuple(args.values())


@pytest.mark.parametrize("seed", range(4))
def test_opcheck(seed):
    case = random_quantile_case(random.Random(seed), max_numel=40, specials=False, empty=False)
    torch.library.opcheck(OPS.quantile_.default, case.args())


def test_compiled_without_a_break():
    def both(x, clip, coef, row):
        OPS.quantile_(None, clip, [x, x], coef, row, 0, None, 0.5, 1.0, 3.0)
        return clip * 2

    x, coef, row = torch.randn(B, 40), torch.rand(N, 2), torch.tensor(1)
    expected = both(x, new(B, 3), coef, row)
    assert torch.equal(torch.compile(both, backend="aot_eager", fullgraph=True)(x, new(B, 3), coef, row), expected)


TAKEN = {
    "as it is": {},
    "the table of a step": dict(coef=torch.ones(N, 40)),
    "one row": dict(row=None, row_index=2),
    "row of no dimension": dict(row=torch.tensor(1)),
    "one result": dict(out=None),
    "the other": dict(clip=None),
    "no scale": dict(scale=None),
    "scale of other strides": dict(scale=torch.ones(K, B).t()),
    "rows of a table that are the same": dict(coef=torch.ones(1, K).expand(N, K)),
    "channels last": dict(inputs=[new(whole).contiguous(memory_format=torch.channels_last), new(whole)]),
    "one sample for all": dict(inputs=[new(1, *SHAPE).expand(whole), new(whole)]),
    "results in one tensor": dict(out=storage[:20].view(2, 10)[:, 0], clip=storage[20:40].view(2, 10)[:, 4:7]),
    "one tensor twice": dict(inputs=[storage[:96].view(whole)] * 2),
    "limits that cross": dict(low=3.0),
    "an infinite limit": dict(high=float("inf")),
}
REFUSED = [  # changes, parts of the message
    (dict(out=None, clip=None), ["out and clip are None", "nothing to write"]),
    (dict(inputs=[]), ["inputs holds 0 tensors", "1 to 12"]),
    (dict(inputs=[new(whole)] * 13), ["inputs holds 13 tensors", "1 to 12"]),
    (dict(inputs=[new(whole), new(B, 3, 4, 5)]), ["inputs[1] has shape (2, 3, 4, 5), inputs[0] has (2, 3, 4, 4)", "one shape"]),
    (dict(inputs=[new(whole), new(whole, dtype=torch.float64)]), ["inputs[1] is float64", "bfloat16"]),
    (dict(inputs=[new(whole, dtype=torch.int32), new(whole)]), ["inputs[0] is int32", "bfloat16"]),
    (dict(inputs=[new(B, 3, 4, 8)[..., ::2], new(whole)]), ["inputs[0]", "(96, 32, 8, 2)", "channels-last"]),
    (dict(inputs=[new(B, 0)] * 2), ["inputs[0] has shape (2, 0)", "at least one element"]),
    (dict(inputs=[new(())] * 2), ["inputs[0] has shape ()", "(batch, *shape)"]),
    (dict(out=new(B, 1)), ["out has shape (2, 1)", "(batch,) = (2,)"]),
    (dict(out=new(B, dtype=torch.float16)), ["out is float16", "float32"]),
    (dict(out=new(1).expand(B)), ["out of shape (2,) overlaps itself", "(0,)"]),
    (dict(clip=new(B, 2)), ["clip has shape (2, 2)", "(batch, 3) = (2, 3)"]),
    (dict(clip=new(B, dtype=torch.float32)), ["clip has shape (2,)", "(batch, 3)"]),
    (dict(clip=new(3, B).t()), ["clip has strides (1, 2)", "stride 1"]),
    (dict(clip=storage.as_strided((B, 3), (2, 1))), ["clip of shape (2, 3) overlaps itself", "(2, 1)"]),
    (dict(coef=new(N)), ["coef has shape (3,)", "(rows, 2 or more)"]),
    (dict(coef=new(N, 1)), ["coef has shape (3, 1)", "(rows, 2 or more)"]),
    (dict(coef=new(0, K)), ["coef has shape (0, 2)", "at least one row"]),
    (dict(coef=new(K, N).t()), ["coef has strides (1, 3)", "stride 1"]),
    (dict(coef=new(N, K, dtype=torch.float64)), ["coef is float64", "float32"]),
    (dict(row=new(3, dtype=torch.int64)), ["row has shape (3,)", "(batch,) = (2,)"]),
    (dict(row=new(B)), ["row is float32", "int32 or int64"]),
    (dict(row=torch.tensor([0, N])), ["row holds", "3", "rows 0 to 2"]),
    (dict(row=torch.tensor(-1)), ["row holds -1", "rows 0 to 2"]),
    (dict(row=None, row_index=N), ["row_index is 3", "rows 0 to 2"]),
    (dict(scale=new(B, 3)), ["scale has shape (2, 3)", "(batch, inputs) = (2, 2)"]),
    (dict(scale=new(B, K, dtype=torch.float16)), ["scale is float16", "float32"]),
    (dict(q=1.5), ["q is 1.5", "0 to 1"]),
    (dict(q=-0.25), ["q is -0.25", "0 to 1"]),
    (dict(q=float("nan")), ["q is nan", "0 to 1"]),
    (dict(low=0.0), ["low is 0", "above 0"]),
    (dict(high=-1.0), ["low is 1", "high is -1", "above 0"]),
    (dict(high=float("nan")), ["high is nan", "above 0"]),
    (dict(out=storage[:2], inputs=[storage[:96].view(whole), new(whole)]), ["out overlaps inputs[0]"]),
    (dict(clip=storage[90:96].view(B, 3), inputs=[new(whole), storage[:96].view(whole)]), ["clip overlaps inputs[1]"]),
    (dict(out=storage[:2], clip=storage[1:7].view(B, 3)), ["clip overlaps out"]),
    (dict(out=storage[:2], scale=storage[1:5].view(B, K)), ["out overlaps scale"]),
    (dict(clip=storage[:6].view(B, 3), coef=storage[5:11].view(N, K)), ["clip overlaps coef"]),
]


@pytest.mark.parametrize("what", TAKEN)
def test_taken(what):
    check_quantile(*good(**TAKEN[what]))
    OPS.quantile_(*good(**TAKEN[what]))


@pytest.mark.parametrize("case", range(len(REFUSED)), ids=lambda i: " ".join(REFUSED[i][1]))
def test_refused(case):
    changes, parts = REFUSED[case]
    args = good(**changes)
    before = [None if t is None else t.clone() for t in args[:2]]
    for refuse in (check_quantile, OPS.quantile_):
        with pytest.raises(ValueError) as error:
            refuse(*args)
        message = str(error.value)
        assert message.startswith("quantile_: ") and all(part in message for part in parts), message
    assert all(t is None or torch.equal(t, was) for t, was in zip(args, before))


def test_devices_do_not_mix():
    for name in ("out", "clip", "coef", "row", "scale"):
        args = dict(zip(("out", "clip", "inputs", "coef", "row", "row_index", "scale", "q", "low", "high"), good()))
        args[name] = args[name].to("meta")
        with pytest.raises(ValueError, match=f"quantile_: .*{name}|quantile_: .*meta"):
            OPS.quantile_(*args.values())
