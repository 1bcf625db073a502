#!/usr/bin/env bash
# Builds the wheel, installs it into an empty environment and runs the tests there, outside the checkout.
#   tests/packaging/wheel_test.sh           with the C++ library
#   tests/packaging/wheel_test.sh pure      FASTDIFF_PURE_PYTHON=1: nothing compiled
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
kind=${1:-native}
python="$root/.venv/bin/python"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

[ "$kind" = pure ] && export FASTDIFF_PURE_PYTHON=1
mkdir "$work/source" && (cd "$root" && git ls-files -z | xargs -0 cp --parents -t "$work/source")
"$python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work/dist" "$work/source"
ls "$work/dist"

"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$root/requirements-no-deps.txt" "$work"/dist/*.whl

mkdir "$work/away" && cp -r "$root/tests" "$root/benchmarks" "$root/docs" "$root/README.md" "$root/pyproject.toml" "$work/away" && cd "$work/away"
"$work/venv/bin/fastdiff" doctor
"$work/venv/bin/pytest" -n 2 --dist worksteal -q tests
