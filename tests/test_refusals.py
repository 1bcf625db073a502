"""Wrong input is refused before any work: the model is not called, nothing is written, and the message says what was
given and what is taken."""

import math

import pytest
import torch

import fastdiff as fd
from fastdiff.reference import Layout

SHAPE = (2, 3, 4, 4)


class Model:
    """Counts its calls: a refusal comes before the first."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, t):
        self.calls += 1
        return torch.zeros_like(x)


def edm(**options):
    return fd.plan("euler", schedule="edm", prediction="denoised", steps=4, **options)


def sample(model, *, plan=None, shape=SHAPE, seeds=0, **options):
    return fd.sample(model, edm() if plan is None else plan, shape, seeds, **options)


def named(name="euler", schedule="edm", steps=4, prediction="denoised", **options):
    return fd.plan(name, schedule=schedule, steps=steps, prediction=prediction, **options)


# what is done with a model, and what the message must hold
SAMPLE = {
    "model is not callable": (lambda m: fd.sample(3, edm(), SHAPE, 0), ["int", "model(x, time)"]),
    "plan is a name": (lambda m: fd.sample(m, "euler", SHAPE, 0), ["str", "fd.plan"]),
    "shape is an int": (lambda m: sample(m, shape=4), ["4", "(B, ...)"]),
    "shape without a batch": (lambda m: sample(m, shape=(3,)), ["(3,)", "two dimensions"]),
    "shape with a negative size": (lambda m: sample(m, shape=(2, -1)), ["(2, -1)"]),
    "shape of floats": (lambda m: sample(m, shape=(2.0, 3)), ["2.0", "ints"]),
    "too few seeds": (lambda m: sample(m, seeds=[1]), ["1 entries", "2 samples"]),
    "too many seeds": (lambda m: sample(m, seeds=[1, 2, 3]), ["3 entries", "2 samples"]),
    "a seed over 64 bits": (lambda m: sample(m, seeds=[0, 2**64]), [str(2**64), "2^64 - 1"]),
    "a seed that is a float": (lambda m: sample(m, seeds=[0, 1.5]), ["1.5", "ints"]),
    "seeds as text": (lambda m: sample(m, seeds="12"), ["'12'", "sequence of ints"]),
    "seeds as a float tensor": (lambda m: sample(m, seeds=torch.zeros(2)), ["torch.float32", "int64"]),
    "batch_size 0": (lambda m: sample(m, batch_size=0), ["0", "1 or more"]),
    "batch_size as text": (lambda m: sample(m, batch_size="4"), ["'4'", "int"]),
    "callback is not callable": (lambda m: sample(m, callback=3), ["int", "called"]),
    "dtype float64": (lambda m: sample(m, dtype=torch.float64), ["torch.float64", "torch.bfloat16"]),
    "init for a plan that starts from noise": (lambda m: sample(m, init=torch.zeros(SHAPE)), ["starts from noise", "start="]),
    "known for a plan that does not inpaint": (lambda m: sample(m, known=torch.zeros(SHAPE)), ["does not inpaint", "inpaint="]),
    "an inpainting plan without a mask": (lambda m: sample(m, plan=edm(inpaint="d"), known=torch.zeros(SHAPE)),
                                          ["mask is missing", "known and mask"]),
    "known of another shape": (lambda m: sample(m, plan=edm(inpaint="d"), known=torch.zeros(2, 3, 4, 5), mask=torch.ones(1, 1, 4, 4)),
                               ["(2, 3, 4, 5)", "(2, 3, 4, 4)"]),
    "a mask of another batch": (lambda m: sample(m, plan=edm(inpaint="d"), known=torch.zeros(SHAPE), mask=torch.ones(3, 1, 4, 4)),
                                ["(3, 1, 4, 4)"]),
    "a mask of another width": (lambda m: sample(m, plan=edm(inpaint="d"), known=torch.zeros(SHAPE), mask=torch.ones(1, 1, 4, 5)),
                                ["(1, 1, 4, 5)"]),
    "an unknown sampler": (lambda m: named("eulr"), ["'eulr'", "'euler'"]),
    "an unknown schedule": (lambda m: named(schedule="linaer"), ["'linaer'", "linear"]),
    "an unknown prediction": (lambda m: named(prediction="epsilom"), ["'epsilom'", "epsilon"]),
    "an unknown option": (lambda m: named(etaa=1.0), ["etaa"]),
    "steps 0": (lambda m: named(steps=0), ["0"]),
    "steps negative": (lambda m: named(steps=-3), ["-3"]),
    "steps a float": (lambda m: named(steps=2.5), ["2.5"]),
    "a negative sigma": (lambda m: fd.plan("euler", schedule="edm", sigmas=[3.0, -1.0, 0.0], prediction="denoised"), ["-1"]),
    "sigmas that rise": (lambda m: fd.plan("euler", schedule="edm", sigmas=[1.0, 2.0, 0.0], prediction="denoised"), ["2"]),
    "sigmas with a NaN": (lambda m: fd.plan("euler", schedule="edm", sigmas=[1.0, math.nan, 0.0], prediction="denoised"), ["nan"]),
    "an infinite eta": (lambda m: named("euler_ancestral", eta=math.inf), ["inf"]),
    "an unknown stream": (lambda m: fd.randn(SHAPE, seeds=0, stream="inti"), ["'inti'", "'init'"]),
    "a negative draw": (lambda m: fd.randn(SHAPE, seeds=0, draw=-1), ["-1", "0 to 2^63"]),
    "normals in float64": (lambda m: fd.randn(SHAPE, seeds=0, dtype=torch.float64), ["torch.float64", "torch.float16"]),
    "known on another device": (lambda m: sample(m, plan=edm(inpaint="d"), known=torch.zeros(SHAPE, device="meta"), mask=torch.ones(1, 1, 4, 4)),
                                ["known", "meta"]),
    "known as an array": (lambda m: sample(m, plan=edm(inpaint="d"), known=[[1.0]], mask=torch.ones(1, 1, 4, 4)), ["list", "tensor"]),
    "a negative eta": (lambda m: named("ddim", eta=-1.0), ["eta", "-1"]),
    "a negative churn": (lambda m: named("heun", s_churn=-1), ["s_churn", "-1"]),
    "an eta that is text": (lambda m: named("ddim", eta="nan"), ["eta", "'nan'"]),
    "a grid of rho 0": (lambda m: named(rho=0.0), ["rho", "0"]),
    "clip bounds that are one number": (lambda m: named(clip_denoised=1.0), ["1.0", "(low, high)"]),
    "a prediction that is a list": (lambda m: named(prediction=["v"]), ["['v']", "epsilon"]),
    "a shape of text": (lambda m: fd.randn("23", seeds=0), ["'23'", "ints"]),
    "a shape with a fraction": (lambda m: fd.randn((2, 3.7), seeds=0), ["3.7", "ints"]),
    "fold_in of a fraction": (lambda m: fd.fold_in(torch.zeros(2, dtype=torch.int64), 1.5), ["1.5", "int"]),
    "a bank without a last dimension": (lambda m: edm().with_bank(1.0), ["1.0", "number of vectors"]),
    "a plan from JSON with a ring of 10^8": (lambda m: fd.Plan.from_json(edm().to_json().replace('"ring": 0', '"ring": 100000000')),
                                            ["100000002", "12"]),
    "a plan from JSON that lacks a field": (lambda m: fd.Plan.from_json(edm().to_json().replace('"ring"', '"rings"')), ["ring"]),
    "a plan from JSON of another format": (lambda m: fd.Plan.from_json("[]"), ["list", "format"]),
    "normals of no shape": (lambda m: fd.randn((), seeds=0), ["()", "(B, ...)"]),
}


@pytest.mark.parametrize("case", SAMPLE)
def test_sample_refuses(case):
    act, fragments = SAMPLE[case]
    model = Model()
    with pytest.raises((ValueError, TypeError, RuntimeError)) as refused:
        act(model)
    assert model.calls == 0
    for fragment in fragments:
        assert fragment in str(refused.value), str(refused.value)


LAYOUT = Layout(3, 1, 1, 1)  # two listed inputs and one ring slot, one bank term, one noise term


def arguments(**changes):
    """A good call of ``step_``, with changes. Sentinels everywhere that could be written."""
    B = 2
    coef = torch.full((4, LAYOUT.width), 0.5)
    whole = {
        "inputs": [torch.ones(SHAPE), torch.ones(SHAPE)], "outputs": [torch.full(SHAPE, 7.0)],
        "ring": torch.full((1, *SHAPE), 7.0), "coef": coef,
        "meta": torch.tensor([[0, 0, -1, 0]] * 4, dtype=torch.int32), "row": None, "row_index": 1,
        "keys": torch.zeros(4, 1, B, 2, dtype=torch.int64), "scale": torch.ones(B, 3), "bank": torch.ones(5, 3, 4, 4),
        "bank_index": torch.zeros(B, 1, dtype=torch.int64), "bank_weight": torch.ones(B, 1), "clip": torch.ones(B, 3),
        "known": torch.ones(SHAPE), "mask": torch.ones(1, 1, 4, 4), "status": torch.tensor([2**31 - 1, 0], dtype=torch.int32),
    }
    return {**whole, **changes}


def shared(offset):
    """Two overlapping views of one memory."""
    memory = torch.full((200,), 7.0)
    return memory[:96].view(SHAPE), memory[offset : offset + 96].view(SHAPE)


def overlap(offset):
    a, b = shared(offset)
    return {"inputs": [a, torch.ones(SHAPE)], "outputs": [b]}


def two_outputs(same):
    a, b = shared(0 if same else 8)
    layout = Layout(3, 2, 1, 1)
    return {"outputs": [a, b], "coef": torch.full((4, layout.width), 0.5)}


def meta(*row):
    return {"meta": torch.tensor([row] * 4, dtype=torch.int32)}


STEP = {
    "an input of another shape": ({"inputs": [torch.ones(SHAPE), torch.ones(2, 3, 4, 5)]}, ["(2, 3, 4, 5)", "(2, 3, 4, 4)"]),
    "an output of another shape": ({"outputs": [torch.full((2, 3, 16), 7.0)]}, ["(2, 3, 16)", "(2, 3, 4, 4)"]),
    "an input in float64": ({"inputs": [torch.ones(SHAPE), torch.ones(SHAPE, dtype=torch.float64)]}, ["inputs[1]", "float16"]),
    "an output of ints": ({"outputs": [torch.full(SHAPE, 7, dtype=torch.int32)]}, ["outputs[0]", "bfloat16"]),
    "an input on another device": ({"inputs": [torch.ones(SHAPE), torch.ones(SHAPE, device="meta")]}, ["inputs[1]", "meta"]),
    "thirteen inputs": ({"inputs": [torch.ones(SHAPE)] * 13}, ["12"]),
    "four outputs": ({"outputs": [torch.full(SHAPE, 7.0) for _ in range(4)]}, ["4", "3"]),
    "a transposed sample": ({"inputs": [torch.ones(SHAPE), torch.ones(SHAPE).transpose(2, 3)]}, ["inputs[1]", "contiguous"]),
    "an output with gaps": ({"outputs": [torch.full((2, 3, 4, 8), 7.0)[..., ::2]]}, ["outputs[0]", "contiguous"]),
    "an output that overlaps itself": ({"outputs": [torch.full((1, 3, 4, 4), 7.0).expand(SHAPE)]}, ["outputs[0]"]),
    "an output that half overlaps an input": (overlap(8), ["overlap"]),
    "an output one element off an input": (overlap(1), ["overlap"]),
    "two outputs that half overlap": (two_outputs(False), ["overlap"]),
    "two outputs in one memory": (two_outputs(True), ["overlap"]),
    "a table of another width": ({"coef": torch.zeros(4, LAYOUT.width + 1)}, [str(LAYOUT.width + 1), str(LAYOUT.width)]),
    "a table in float64": ({"coef": torch.zeros(4, LAYOUT.width, dtype=torch.float64)}, ["coef", "float32"]),
    "meta of another length": ({"meta": torch.zeros(3, 4, dtype=torch.int32)}, ["meta", "3", "4"]),
    "meta in int64": ({"meta": torch.zeros(4, 4, dtype=torch.int64)}, ["meta", "int32"]),
    "a row index past the end": ({"row_index": 4}, ["4", "row"]),
    "a negative row index": ({"row_index": -1}, ["-1", "row"]),
    "a row tensor past the end": ({"row": torch.tensor([0, 9])}, ["9", "row"]),
    "a row tensor of floats": ({"row": torch.zeros(2)}, ["row", "int64"]),
    "a row tensor of another batch": ({"row": torch.zeros(3, dtype=torch.int64)}, ["row", "(3,)"]),
    "tokens that are not the sample's": ({"row": torch.zeros(2, 2, dtype=torch.int64)}, ["row", "(2, 2)"]),
    "a ring slot that is not there": (meta(1, 0, -1, 0), ["ring"]),
    "a ring of another shape": ({"ring": torch.full((1, 2, 3, 4, 5), 7.0)}, ["ring", "(1, 2, 3, 4, 5)"]),
    "keys in int32": ({"keys": torch.zeros(4, 1, 2, 2, dtype=torch.int32)}, ["keys", "int64"]),
    "keys without the pair": ({"keys": torch.zeros(4, 1, 2, dtype=torch.int64)}, ["keys", "(4, 1, 2)"]),
    "keys of another batch": ({"keys": torch.zeros(4, 1, 3, 2, dtype=torch.int64)}, ["keys", "(4, 1, 3, 2)"]),
    "keys of another number of rows": ({"keys": torch.zeros(3, 1, 2, 2, dtype=torch.int64)}, ["keys", "(3, 1, 2, 2)"]),
    "scale of another width": ({"scale": torch.ones(2, 2)}, ["scale", "(2, 2)", "(2, 3)"]),
    "clip of another width": ({"clip": torch.ones(2, 2)}, ["clip", "(2, 2)", "(2, 3)"]),
    "a bank of another shape": ({"bank": torch.ones(5, 3, 4, 5)}, ["bank", "(5, 3, 4, 5)"]),
    "a bank index past the end": ({"bank_index": torch.tensor([[0], [5]])}, ["bank_index", "5"]),
    "a negative bank index": ({"bank_index": torch.tensor([[-1], [0]])}, ["bank_index", "-1"]),
    "bank weights of another shape": ({"bank_weight": torch.ones(2, 2)}, ["bank_weight", "(2, 2)"]),
    "a bank without its weights": ({"bank_weight": None}, ["bank_weight"]),
    "a masked row without a mask": ({**meta(0, 4, -1, 0), "mask": None}, ["mask"]),
    "a masked row without the known image": ({**meta(0, 4, -1, 0), "known": None}, ["known"]),
    "a mask that does not fit": ({"mask": torch.ones(1, 1, 4, 3)}, ["mask", "(1, 1, 4, 3)"]),
    "keys on another device": ({"keys": torch.zeros(4, 1, 2, 2, dtype=torch.int64, device="meta")}, ["keys", "meta"]),
    "a known image on another device": ({"known": torch.ones(SHAPE, device="meta")}, ["known", "meta"]),
    "a status in int64": ({"status": torch.tensor([1, 0])}, ["status", "int32"]),
}


def snapshot(call):
    tensors = [*call["inputs"], *call["outputs"], call["ring"], call["status"]]
    return [t.clone() for t in tensors if t is not None and t.device.type == "cpu"], tensors


@pytest.mark.parametrize("case", STEP)
def test_step_refuses(case):
    changes, fragments = STEP[case]
    call = arguments(**changes)
    before, tensors = snapshot(call)
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)) as refused:
        torch.ops.fastdiff.step_(*call.values())
    for fragment in fragments:
        assert fragment in str(refused.value), str(refused.value)
    after = [t for t in tensors if t is not None and t.device.type == "cpu"]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_call_without_changes_is_taken():
    call = arguments()
    torch.ops.fastdiff.step_(*call.values())
    assert not (call["outputs"][0] == 7).any()


def test_particles_that_are_not_there():
    run = fd.Stepper(edm(), SHAPE, seeds=0)
    before = run.x.clone()
    for ancestors, said in ((torch.tensor([0, 2]), "0 to 2"), (torch.tensor([-1, 0]), "-1 to 0"), (torch.zeros(3, dtype=torch.int64), "(3,)"),
                            (torch.zeros(2), "float32"), ([0, 1], "list")):
        with pytest.raises((ValueError, TypeError, IndexError)) as refused:
            run.gather(ancestors)
        assert said in str(refused.value)
    assert torch.equal(run.x, before)


def test_a_second_derivative_is_refused():
    x = torch.ones(SHAPE, requires_grad=True)
    layout = Layout(1, 1)
    coef = torch.full((1, layout.width), 0.5)
    (y,) = fd.step([x], [torch.float32], None, coef, torch.tensor([[-1, 0, -1, -1]], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("returned, fragments", [
    (lambda x: None, ["NoneType", "tensor"]),
    (lambda x: x[:, :1], ["(2, 1, 4, 4)", "(2, 3, 4, 4)"]),
    (lambda x: (x, x), ["2 model outputs", "1 (out)"]),
    (lambda x: x.double(), ["float64", "bfloat16"]),
])
def test_what_the_model_returns_is_refused(returned, fragments):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as refused:
        sample(lambda x, t: returned(x))
    for fragment in fragments:
        assert fragment in str(refused.value), str(refused.value)


def test_a_nan_from_the_model_is_reported_with_its_step():
    calls = []

    def model(x, t):
        calls.append(1)
        return torch.full_like(x, math.nan) if len(calls) == 3 else torch.zeros_like(x)

    with pytest.raises(FloatingPointError, match="step 2"):
        sample(model)


def test_a_finished_run_takes_no_more_steps():
    run = fd.Stepper(edm(), SHAPE, seeds=0)
    with pytest.raises(RuntimeError, match="is at row"):
        run.result()
    while not run.done:
        run.step(torch.zeros(SHAPE))
    with pytest.raises(RuntimeError, match="run is done"):
        run.step(torch.zeros(SHAPE))
    assert run.result().shape == SHAPE
