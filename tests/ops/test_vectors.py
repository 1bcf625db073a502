"""project_, lift_ and edit_ as torch sees them, and what they refuse: each refusal by the C++ code (or whatever is in use) and by the
checks that the other backends share."""

import random
from types import SimpleNamespace

import pytest
import torch
from vector_cases import OPS as NAMES
from vector_cases import random_vector_case

import fastdiff.ops as ops
import fastdiff.vector_checks as checks

OPS = torch.ops.fastdiff
B, SHAPE, V, M, N = 2, (3, 4, 4), 5, 3, 2


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_opcheck(op, seed):
    case = random_vector_case(random.Random(seed), op, max_numel=40, specials=False, empty=False)
    if case.arguments.get("h") is case.arguments["out"]:  # aliases are for eager code: functional tracing takes them apart
        case.arguments["h"] = case.arguments["h"].clone()
    torch.library.opcheck(getattr(OPS, op).default, case.args())


def good(op, **changes):
    """Arguments that are taken."""
    new = torch.zeros
    index, weight = new(B, M, dtype=torch.int64), torch.ones(B, M)
    args = {
        "project_": dict(out=new(B, M), x=new(B, *SHAPE), basis=new(V, *SHAPE), index=index, gain=new(N, V), offset=new(N, V), weight=weight,
                         row=new(B, dtype=torch.int32), row_index=0),
        "lift_": dict(out=new(B, *SHAPE), basis=new(V, *SHAPE), index=index, weight=weight),
        "edit_": dict(out=new(B, *SHAPE), h=new(B, *SHAPE), bank=new(V, *SHAPE), index=index, weight=weight),
    }[op]
    unknown = changes.keys() - args.keys()
    assert not unknown, unknown
    args.update(changes)
    return tuple(args.values())


new, whole, long = torch.zeros, (B, *SHAPE), torch.int64
storage = torch.zeros(1000)
shared = storage[:96].view(whole)
shifted = storage[48:144].view(whole)
TAKEN = {
    "as it is": {op: {} for op in NAMES},
    "no index": {op: dict(index=None) for op in NAMES},
    "no weight, one row": {"project_": dict(weight=None, row=None, row_index=1)},
    "row of no dimension": {"project_": dict(row=torch.tensor(1))},
    "rows of a table that are the same": {"project_": dict(gain=new(1, V).expand(N, V), index=new(1, M, dtype=long).expand(B, M))},
    "out turned": {"project_": dict(out=new(M, B).t())},
    "out and weight in one tensor": {"project_": dict(out=storage[:20].view(2, 10)[:, :3], weight=storage[:20].view(2, 10)[:, 3:6])},
    "in place": {"edit_": dict(out=shared, h=shared)},
    "halves of one tensor": {"edit_": dict(out=storage[:192].view(B, 6, 4, 4)[:, :3], h=storage[:192].view(B, 6, 4, 4)[:, 3:])},
    "channels last": {"edit_": dict(h=new(whole).contiguous(memory_format=torch.channels_last)),
                      "lift_": dict(basis=new(V, *SHAPE).contiguous(memory_format=torch.channels_last))},
    "an index that no weight uses": {op: dict(index=torch.tensor([[0, 0, V]] * B), weight=torch.tensor([[1.0, 1.0, 0.0]] * B)) for op in NAMES},
    "expanded samples": {"edit_": dict(h=new(1, *SHAPE).expand(whole)), "project_": dict(x=new(1, *SHAPE).expand(whole))},
    "no terms, no vectors": {"lift_": dict(basis=new(0, *SHAPE), index=None, weight=new(B, 0))},
}
vectors = {"project_": "basis", "lift_": "basis", "edit_": "bank"}
like = {"project_": "x", "lift_": "out", "edit_": "out"}
REFUSED = [  # op, changes, parts of the message
    *[(op, {vectors[op]: new(V, 3, 4, 5)}, [f"{vectors[op]} has shape (5, 3, 4, 5), {like[op]} has (2, 3, 4, 4)", "(vectors, *shape)"]) for op in NAMES],
    *[(op, {vectors[op]: new(V, *SHAPE, dtype=torch.float16)}, [vectors[op], "float16", "float32"]) for op in NAMES],
    *[(op, {vectors[op]: new(V, 3, 4, 8)[..., ::2]}, [vectors[op], "(96, 32, 8, 2)", "channels-last"]) for op in NAMES],
    *[(op, {vectors[op]: new(0, *SHAPE)}, [vectors[op], "(0, 3, 4, 4)"]) for op in NAMES if op != "project_"],
    *[(op, dict(index=new(B, M)), ["index is float32", "int32 or int64"]) for op in NAMES],
    *[(op, dict(index=new(B, 4, dtype=long)), ["index has shape (2, 4)", "(2, 3)"]) for op in NAMES],
    *[(op, dict(index=new(B, 2 * M, dtype=long)[:, ::2]), ["index has strides (6, 2)", "stride 1"]) for op in NAMES],
    *[(op, dict(index=torch.tensor([[0, 0, 0], [0, V, 0]])), [f"index[1, 1] is 5: {vectors[op]} holds vectors 0 to 4"]) for op in NAMES],
    *[(op, dict(index=torch.tensor([[0, 0, -1], [0, 0, 0]], dtype=torch.int32)), ["index[0, 2] is -1"]) for op in NAMES],
    *[(op, dict(weight=new(B, M, dtype=torch.float64)), ["weight is float64", "float32"]) for op in NAMES],
    *[(op, dict(weight=new(B, 2 * M)[:, ::2]), ["weight has strides (6, 2)", "stride 1"]) for op in NAMES],
    *[(op, dict(weight=new(3, M)), ["weight has shape (3, 3)", "(batch, terms)"]) for op in NAMES],
    *[(op, {vectors[op]: new(2, *SHAPE), "index": None}, [f"index is None and {vectors[op]} holds 2 vectors: 3 terms"]) for op in NAMES if op != "project_"],
    ("project_", dict(basis=new(2, *SHAPE), gain=new(N, 2), offset=new(N, 2), index=None), ["basis holds 2 vectors: 3 terms"]),
    ("lift_", dict(index=None, weight=new(B, 4097), basis=new(4097, *SHAPE)), ["weight has shape (2, 4097)", "0 to 4096"]),
    ("lift_", dict(out=new(whole, dtype=torch.float16)), ["out is float16", "float32"]),
    ("lift_", dict(out=new(3, 4, 4, 2).movedim(3, 0)), ["out", "channels-last"]),
    ("lift_", dict(out=new(1, *SHAPE).expand(whole)), ["out of shape (2, 3, 4, 4) overlaps itself", "(0, 16, 4, 1)"]),
    ("lift_", dict(out=shared, basis=storage[48:288].view(V, *SHAPE)), ["out overlaps basis"]),
    ("lift_", dict(out=shared, weight=storage[90:96].view(B, M)), ["out overlaps weight"]),
    ("project_", dict(x=new(whole, dtype=torch.float64)), ["x is float64", "bfloat16"]),
    ("project_", dict(x=new(())), ["x has shape ()", "(batch, *shape)"]),
    ("project_", dict(out=new(3, M)), ["out has shape (3, 3), x has (2, 3, 4, 4)", "same batch"]),
    ("project_", dict(out=new(B, M, dtype=torch.bfloat16)), ["out is bfloat16", "float32"]),
    ("project_", dict(out=new(B, 1).expand(B, M)), ["out of shape (2, 3) overlaps itself", "(1, 0)"]),
    ("project_", dict(out=storage.as_strided((B, M), (2, 1))), ["overlaps itself", "(2, 1)"]),
    ("project_", dict(out=storage.as_strided((B, M), (3, 2))), ["overlaps itself", "(3, 2)"]),
    ("project_", dict(out=shared.view(-1)[:6].view(B, M), x=shared), ["out overlaps x"]),
    ("project_", dict(out=storage[:6].view(B, M), weight=storage[3:9].view(B, M)), ["out overlaps weight"]),
    ("project_", dict(gain=new(N, 4)), ["gain has shape (2, 4)", "(rows, vectors)"]),
    ("project_", dict(gain=new(0, V), offset=new(0, V)), ["gain has shape (0, 5)", "at least one row"]),
    ("project_", dict(offset=new(3, V)), ["offset has shape (3, 5), gain (2, 5)"]),
    ("project_", dict(gain=new(V, N).t()), ["gain has strides", "stride 1"]),
    ("project_", dict(row=new(3, dtype=long)), ["row has shape (3,), x has (2, 3, 4, 4)", "(batch,)"]),
    ("project_", dict(row=new(B)), ["row is float32", "int32 or int64"]),
    ("project_", dict(row=torch.tensor([0, N])), ["row holds", "2", "rows 0 to 1"]),
    ("project_", dict(row=None, row_index=-1), ["row_index is -1", "rows 0 to 1"]),
    ("edit_", dict(h=new(B, 3, 4, 5)), ["h has shape (2, 3, 4, 5), out has (2, 3, 4, 4)", "one shape"]),
    ("edit_", dict(out=new(whole, dtype=torch.int32)), ["out is int32", "bfloat16"]),
    ("edit_", dict(out=shared, h=shifted), ["out overlaps h"]),
    ("edit_", dict(out=storage.view(torch.float16)[:96].view(whole), h=shared), ["out overlaps h"]),
    ("edit_", dict(out=shared, h=shared, bank=storage[:240].view(V, *SHAPE)), ["out overlaps bank"]),
]


@pytest.mark.parametrize("what", TAKEN)
def test_taken(what):
    for op, changes in TAKEN[what].items():
        getattr(checks, "check_" + op.strip("_"))(*good(op, **changes))
        getattr(OPS, op)(*good(op, **changes))


@pytest.mark.parametrize("case", range(len(REFUSED)), ids=lambda i: f"{REFUSED[i][0]} {' '.join(REFUSED[i][1])}")
def test_refused(case):
    op, changes, parts = REFUSED[case]
    args = good(op, **changes)
    before = args[0].clone()
    for refuse in (getattr(checks, "check_" + op.strip("_")), getattr(OPS, op)):
        with pytest.raises(ValueError) as error:
            refuse(*args)
        message = str(error.value)
        assert message.startswith(op + ": ") and all(part in message for part in parts), message
    assert torch.equal(args[0], before)


@pytest.mark.parametrize("op", NAMES)
def test_devices_do_not_mix(op):
    with pytest.raises(ValueError, match=f"{op}: .*meta"):
        getattr(OPS, op)(*good(op, weight=torch.ones(B, M, device="meta")))


def test_meta_tensors_cost_nothing():
    huge = torch.empty(4, 2**40, device="meta")
    out, index = torch.empty(4, 3, device="meta"), torch.empty(4, 3, dtype=long, device="meta")
    OPS.project_(out, huge, huge, index, torch.empty(1, 4, device="meta"), torch.empty(1, 4, device="meta"), None, None, 0)
    OPS.lift_(huge, huge, index, out)
    OPS.edit_(huge, huge, huge, index, out)


@pytest.mark.parametrize("grad", [False, True])
def test_compile_without_break_or_recompile(grad):
    """Steering of rows and weights that change, through one graph."""
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(0)
    basis, gain, offset = torch.randn(V, 12, generator=g), torch.randn(N, V, generator=g), torch.randn(N, V, generator=g)

    def steer(x, h, row, weight):
        out, lifted = torch.zeros(len(x), V), torch.empty_like(x)
        OPS.project_(out, torch.tanh(x), basis, None, gain, offset, weight, row, 0)
        OPS.lift_(lifted, basis, None, out)
        h = h * 2
        edited = torch.empty_like(h)
        OPS.edit_(edited, h, basis, None, weight)
        return lifted + x, edited

    with torch.set_grad_enabled(grad), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(steer, fullgraph=True, backend="aot_eager")
        for r in (0, 1, 0):
            args = torch.randn(4, 12, generator=g), torch.randn(4, 12, generator=g), torch.tensor(r), torch.rand(4, V, generator=g)
            for ours, theirs in zip(compiled(*args), steer(*args), strict=True):
                assert torch.equal(ours, theirs)


def test_what_a_library_leaves_out_is_implemented_from_python(monkeypatch):
    """As fastdiff._C_cuda leaves project_ and lift_ to Triton."""
    choice = next(c for c in ops.backends() if c.device == "cpu" and c.used)
    if choice.backend != "cpp":
        pytest.skip(f"the C++ backend is not in use: {choice.reason}")
    there, registered = torch._C._dispatch_has_kernel_for_dispatch_key, []
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: op != "fastdiff::lift_" and there(op, key))
    monkeypatch.setattr(ops, "_library", SimpleNamespace(impl=lambda name, function, key, **_: registered.append((name, function, key))))
    assert "lift_ by reference" in ops._implement(choice).reason or "lift_ by triton" in ops._implement(choice).reason
    (name, function, key), *_ = registered
    assert (name, key) == ("lift_", "CPU") and {entry[0] for entry in registered} == {"lift_"}
    out = torch.zeros(1, 3)
    function(out, torch.ones(2, 3), None, torch.ones(1, 2))
    assert out.tolist() == [[2.0, 2.0, 2.0]]
