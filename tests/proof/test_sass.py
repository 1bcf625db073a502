"""The count of machine instructions, on code whose count is known."""

import numpy as np
import pytest
import torch

import cuda_build
from proof import sass
from proof.bits import backend
from proof.budgets import code, cuda_code
from proof.execute import execute
from ptx import Memory, parse, run

# Each thread runs a loop as often as its argument says, and threads with an even number of steps leave before the end.
LOOP = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry loop(.param .u64 out, .param .u32 steps)
{
	.reg .pred %p<4>;
	.reg .b32 %r<8>;
	.reg .b64 %rd<4>;
	ld.param.u64 %rd1, [out];
	ld.param.u32 %r1, [steps];
	mov.u32 %r2, 0;
	mov.u32 %r3, %tid.x;
	setp.eq.u32 %p1, %r1, 0;
	@%p1 bra $done;
$again:
	.pragma "nounroll";
	xor.b32 %r3, %r3, %r2;
	mul.lo.u32 %r3, %r3, -1640531527;
	ld.global.u32 %r4, [%rd1];
	add.u32 %r3, %r3, %r4;
	add.u32 %r2, %r2, 1;
	setp.lt.u32 %p2, %r2, %r1;
	@%p2 bra $again;
	and.b32 %r5, %r1, 1;
	setp.eq.u32 %p3, %r5, 0;
	@%p3 bra $done;
	mul.wide.u32 %rd2, %r3, %r3;
	red.global.max.u64 [%rd1+8], %rd2;
$done:
	ret;
}
"""


def loop(tmp_path):
    (tmp_path / "loop.ptx").write_text(LOOP)
    assembler = cuda_build.nvcc().parent / "ptxas"
    cuda_build._run([assembler, "-arch=sm_90", "-lineinfo", tmp_path / "loop.ptx", "-o", tmp_path / "loop.cubin"])
    return sass.read((tmp_path / "loop.cubin").read_bytes())["loop"], parse(LOOP).kernels["loop"]


def executed(body, kernel, steps):
    memory, data = Memory(), np.zeros(4, np.uint64)
    address = memory.map(data)
    params = np.array([address, steps], np.uint64).tobytes()[:12]
    counts = run(kernel, 2, 64, params, memory)
    return sass.executed(body, sass.by_line(kernel, counts), 128), counts


def test_loops_are_counted(tmp_path):
    """One more round of the loop is as many instructions as its block has; a branch that is not taken costs nothing."""
    body, kernel = loop(tmp_path)
    graph = sass.Graph(body)
    (block,) = [b for n, b in enumerate(graph.blocks) if b[-1].kind == "BRA" and (n, n) in graph.edges and len(b) > 2]
    one, three, four, many = (executed(body, kernel, steps)[0] for steps in (1, 3, 4, 1001))
    assert three.instructions - one.instructions == 2 * 128 * len(block)
    assert many.instructions - one.instructions == pytest.approx(1000 * 128 * len(block), rel=1e-9)
    assert three.double == one.double == many.double == 128 and four.double in (0, 128)  # 128 where it is predicated
    none, counts = executed(body, kernel, 0)
    assert none.instructions < one.instructions and counts.loaded["global"] == 0


def test_straight_code_is_counted_to_the_instruction():
    """normal<8, dense> has one way through it: every instruction up to its last EXIT."""
    out, keys = torch.zeros(2, 4, 64, 64), torch.zeros(2, 2, dtype=torch.int64)
    recording = backend("cuda").record(90, "normal_", out, keys)
    (launch,), (counts,) = recording.launches, execute(recording, [out])
    body, _ = code("cuda", launch, 90)
    instructions = [i for i in body if not isinstance(i, str)]
    last = max(n for n, i in enumerate(instructions) if i.kind == "EXIT")
    found = sass.executed(body, sass.by_line(launch.kernel, counts), out.numel() // 8)
    assert found.instructions == (last + 1) * out.numel() // 8 and found.agreeing == 1
    assert found.double == sum(i.double for i in instructions) * out.numel() // 8
    assert sum(i.double for i in instructions) >= 2 * 20  # two Philox calls of ten rounds of two products


def test_a_subroutine_runs_as_often_as_it_is_called():
    """Its lines say nothing: here that each thread ran them."""
    one = sass.Instruction
    body = [one(1, "P0", "BRA", "`(.L_1)"), one(2, None, "MOV", "R20, 0x50"), one(2, None, "CALL.REL.NOINC", "`($sub)"),
            one(3, None, "MOV", "R4, R20"), ".L_1", one(4, None, "FADD", "R4, R4, R4"), one(5, None, "EXIT", ""),
            "$sub", *[one(9, None, "IADD3", "R1, R1, R2, RZ")] * 5, one(9, None, "RET.REL.NODEC", "R20 `(main)")]
    lines = {1: 100, 2: 40, 3: 40, 4: 100, 5: 100, 9: 100}
    found = sass.executed(body, lines, 100)
    assert (found.instructions, found.double, found.agreeing) == (pytest.approx(100 + 2 * 40 + 40 + 2 * 100 + 6 * 40), 0, 1)
    assert sass.executed(body, {**lines, 2: 0, 3: 0}, 100).instructions == pytest.approx(100 + 2 * 100)


def test_what_is_moved_or_predicated_counts_where_it_stands():
    """An instruction of another block's line, and one whose guard is false for every thread, take the slots of their block."""
    one = sass.Instruction
    body = [one(1, None, "FMUL", ""), one(7, None, "MOV", ""), one(2, "P0", "BRA", "`(.L_1)"),
            one(3, None, "FADD", ""), one(3, None, "FADD", ""), ".L_1", one(4, None, "FMUL", ""),
            *[one(5, "!P1", "FFMA", "")] * 2, one(4, None, "STG", ""), one(6, None, "EXIT", "")]
    lines = {1: 64, 2: 64, 3: 32, 4: 64, 5: 0, 6: 64, 7: 1}
    found = sass.executed(body, lines, 64)
    assert found.instructions == pytest.approx(3 * 64 + 2 * 32 + 5 * 64) and found.agreeing == pytest.approx(7 / 10)


def test_lines_do_not_change_the_code():
    """What is counted is the code of the build: ptxas makes the same with and without lines."""
    plain, annotated = cuda_code(90, False)[0], cuda_code(90, True)[0]
    assert plain.keys() == annotated.keys()

    def without_lines(body):
        return [i if isinstance(i, str) else i[1:] for i in body]

    for name, body in plain.items():
        assert without_lines(body) == without_lines(annotated[name]), name
        assert any(not isinstance(i, str) and i.line for i in annotated[name])


def test_what_leads_nowhere_known_is_refused():
    branch = sass.Instruction(1, None, "BRX", "R2 -0x10")
    with pytest.raises(ValueError, match="BRX"):
        sass.Graph([branch])
