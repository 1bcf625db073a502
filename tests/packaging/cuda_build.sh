#!/usr/bin/env bash
# Builds the wheel against a CUDA build of torch and looks at what came out (tests/cuda/test_library.py): it loads without
# a driver, every op has its schema and its CUDA implementation, the machine code of every target is inside.
# No GPU is used. Everything stays in build/cuda: 6 GB. The first time it takes two minutes, then half a minute.
# Where there is no nvcc, no such torch or no room, it says so and ends with 0.
set -eu
cd "$(dirname "$0")/../.."
torch=2.14.1
work=build/cuda
python=$work/venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1

not_run() { echo "cuda-build: NOT RUN: $1"; exit 0; }
said() { echo "cuda-build: $1 (${SECONDS} s)"; }

nvcc=$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")
[ -x "$nvcc" ] || not_run "there is no nvcc"
mkdir -p $work

# requirements.txt has every other pin. diffusers is left out: nothing here needs it.
sed -e "s/^torch==.*/torch==$torch/" -e '/^triton==/d' -e '/^diffusers==/d' requirements.txt > $work/requirements.txt
if ! cmp -s $work/requirements.txt $work/.installed; then
  free=$(df --output=avail -B1G $work | tail -1)
  [ "$free" -ge 8 ] || not_run "$free GB are free, 8 are needed"
  rm -rf $work/venv
  "${PYTHON:-python3}" -m venv $work/venv
  $python -m pip install -qq -r $work/requirements.txt || not_run "torch $torch could not be installed"
  cp $work/requirements.txt $work/.installed
  said "torch $torch is installed"
fi
cuda=$($python -c 'import torch; print(torch.version.cuda or "")') || not_run "torch $torch does not load here"
[ -n "$cuda" ] || not_run "torch $torch as installed here is built without CUDA"
release=$("$nvcc" --version | grep release)
case $release in *"release ${cuda%%.*}."*) ;; *) not_run "torch $torch is built for CUDA $cuda, nvcc is $release" ;; esac

# In a copy, so that the library of the checkout stays what it is; from nothing, so that no object is an older source's.
rm -rf $work/source $work/dist
mkdir $work/source
git ls-files -z --cached --others --exclude-standard | tar --null -T - --ignore-failed-read -cf - | tar -xf - -C $work/source
env -u TORCH_CUDA_ARCH_LIST -u FASTDIFF_SKIP_CUDA -u FASTDIFF_PURE_PYTHON $python -m pip wheel -qq --no-build-isolation --no-deps --wheel-dir $work/dist $work/source
$python -m pip install -qq --no-deps --force-reinstall $work/dist/*.whl
said "$(cd $work/dist && ls -sh *.whl)"

(cd $work && venv/bin/python -c 'import fastdiff._C, fastdiff._C_cuda' && venv/bin/fastdiff doctor)
$work/venv/bin/pytest -q -p no:xdist tests/cuda/test_library.py
said "done"
