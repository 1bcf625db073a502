"""Which line of csrc/ an instruction of a CUDA kernel comes from."""

import functools
import re
import tempfile

import cuda_build
from ptx import parse

_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', re.M)
_PLACE = re.compile(r"\s*\.loc\s+(\d+) (\d+) \d+(?:, function_name \S+, inlined_at (\d+) (\d+) \d+)?")


@functools.cache
def _annotated(arch):
    """The PTX of the step kernels with the lines that it comes from."""

    def build(to):
        with tempfile.TemporaryDirectory() as scratch:
            options = [*cuda_build.NVCC_FLAGS, f"-arch=sm_{arch}", "-lineinfo", "--ptx"]
            cuda_build._run([cuda_build.nvcc(), *options, cuda_build.CUDA / "step.cu", "-o", to / "step.ptx"], cwd=scratch)

    text = (cuda_build.kept(f"source_{arch}", build, str(cuda_build.nvcc())) / "step.ptx").read_text()
    return re.sub(r"\.section[^{]*\{.*?\n\s*\}", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)


@functools.cache
def _line(path, number):
    """A line of a file, without its comment."""
    try:
        with open(path) as file:
            return re.sub(r"\s*//.*", "", file.read().splitlines()[number - 1]).strip()
    except (OSError, IndexError):
        return ""


def lines(kernel, arch=90):
    """By instruction: the line that it comes from, and behind " < " the line that this one is inlined at."""
    text = _annotated(arch)
    files = dict(_FILE.findall(text))
    same = parse(text).kernels[kernel.name]
    assert [i.text for i in same.instructions] == [i.text for i in kernel.instructions], "other code with the lines than without"
    places, now = {}, ""
    for number, line in enumerate(text.splitlines(), 1):
        if (m := _PLACE.match(line)) and m[2] != "0":  # 0: nvcc knows no line
            now = _line(files[m[1]], int(m[2])) + (f" < {_line(files[m[3]], int(m[4]))}" if m[3] else "")
        places[number] = now
    return [places[i.line] for i in same.instructions]
