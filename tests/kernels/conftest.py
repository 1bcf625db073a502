import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def worker():
    """Runs a script of this folder in a process of its own, since compiled and interpreted Triton do not mix; returns what it prints."""

    def run(script, *arguments, **environment):
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), env.get("PYTHONPATH", "")])
        done = subprocess.run([sys.executable, str(HERE / script), *arguments], capture_output=True, text=True, env={**env, **environment})
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return done.stdout

    return run
