"""The arithmetic of the compiled kernels is IEEE's, by its instructions: read, not run."""

import pytest

import cases
import cuda_build
from proof import draw_steering, lint
from proof.bits import TARGETS, backend
from proof.draw import step_case


@pytest.mark.parametrize("arch", TARGETS)
def test_cuda(arch):
    for unit in cuda_build.UNITS:
        text = (cuda_build.compiled(arch) / f"{unit}.ptx").read_text()
        assert len(lint.statements(text)) > 1000 and lint.faults(text) == []


KERNEL = """
.version 8.7
.target sm_90
.visible .entry planted(.param .u64 planted_param_0)
{
	.reg .f32 %f<4>;   // comment; add.f32 is not here
$L__BB0_1: {.reg .b16 h; cvt.f32.f16 %f1, h;}
	.loc 1 2 3
	@!%p1 INSTRUCTION; mov.b64 {%r1, %r2}, %rd1;
	ret;
}
"""


@pytest.mark.parametrize("opcode", [
    "add.f32", "sub.f32", "mul.f32", "fma.rz.f32", "mad.f32", "div.full.f32", "div.approx.f32", "div.rz.f32",
    "sqrt.approx.f32", "sqrt.rm.f32", "rcp.rp.f32", "rsqrt.approx.f32", "add.rn.ftz.f32", "fma.rn.ftz.f32", "setp.lt.ftz.f32",
    "mul.rn.sat.f32", "cvt.rn.ftz.f16.f32", "min.f32", "max.NaN.f32", "ex2.approx.f32", "lg2.approx.f32", "sin.approx.f32",
    "tanh.approx.f32", "cvt.rz.f16.f32", "cvt.rna.tf32.f32", "cvt.f32.f64", "cvt.f32.u32", "cvt.rz.f32.s32",
    "cvt.rz.bf16x2.f32", "cvt.rn.relu.f16x2.f32", "cvt.rzi.s32.f32", "cvt.sat.u8.s32", "add.rn.f64", "fma.rn.f64",
    "cvt.f64.f32", "add.rn.f16", "fma.rn.bf16x2", "add.f32x2", "red.global.add.f32", "atom.global.add.f32"])
def test_planted_faults_are_found(opcode):
    found = lint.faults(KERNEL.replace("INSTRUCTION", f"{opcode} %f1, %f2, %f3"))
    assert [(line, name) for line, name, _ in found] == [(9, opcode)]


@pytest.mark.parametrize("opcode", [
    "add.rn.f32", "fma.rn.f32", "sqrt.rn.f32", "neg.f32", "setp.nan.f32", "selp.f32", "cvt.rn.f16.f32", "cvt.rn.bf16x2.f32",
    "cvt.rn.f32.u32", "cvt.f32.bf16", "add.s32", "mul.wide.u32", "cvt.u64.u32", "min.s32", "ld.global.v4.f32", "fma.rn.f32x2",
    "mov.b64", "atom.global.min.s32"])
def test_what_is_exact_passes(opcode):
    text = KERNEL.replace("INSTRUCTION", f"{opcode} %f1, %f2, %f3")
    assert lint.faults(text) == []
    assert [name for _, name, _ in lint.statements(text)] == ["cvt.f32.f16", opcode, "mov.b64", "ret"]


@pytest.mark.parametrize("arch", TARGETS)
def test_triton(arch):
    import torch

    triton = backend("triton")
    launches = [triton.record(arch, "step_", *step_case(i).args()).launches[0] for i in (0, 8, 11)]
    for dtype in cases.DTYPES.values():
        launches += triton.record(arch, "normal_", torch.zeros(2, 40, dtype=dtype), torch.zeros(2, 2, dtype=torch.int64)).launches
    for op in (op for op in draw_steering.OPS if op in triton.OPS):
        launches += triton.record(arch, op, *draw_steering.case(op, 2)).launches
    for one in launches:
        text = triton.compiled(one)[0]
        assert len(lint.statements(text)) > 100 and lint.faults(text) == []
