# make demo: build, and draw pictures.   make test: build, and test.   Both make .venv if need be; nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml fastdiff/ops.schema $(shell find csrc -type f)
WORKERS ?= 2

.PHONY: demo test bench zoo steer golden budgets gpu-proof mutation launches launch-cost cuda-build matrix sanitize wheel-test clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(BIN)/fastdiff demo --out demo
	$(BIN)/python -m benchmarks.steering --demo --out demo

test: $(VENV)/.built
	$(BIN)/pytest -n $(WORKERS) --dist worksteal tests

bench: $(VENV)/.built
	@mkdir -p benchmarks/results/local
	$(BIN)/pytest -q benchmarks -p no:xdist --benchmark-json benchmarks/results/local/bench.json --ratios benchmarks/results/ratios.json

zoo: $(VENV)/.built
	$(BIN)/python -m benchmarks.zoo.train all

# Steering and guidance by gradients side by side, on the zoo. Hours; goes on where it was stopped.
steer: $(VENV)/.built
	$(BIN)/python -m benchmarks.steering

# The golden digests anew, by the reference alone: for changes of what an op means.
golden: $(VENV)/.built
	$(BIN)/python -m fastdiff.testing --write tests/golden

# What compiled GPU code may cost, anew: look at the difference before it is committed.
budgets: $(VENV)/.built
	PYTHONPATH=tests $(BIN)/python -m proof.budgets --write

# Every GPU kernel for every target, executed without a GPU: bits, costs and predicted times as one table.
gpu-proof: $(VENV)/.built
	PYTHONPATH=tests $(BIN)/python -m proof.table

# Is every instruction of six step kernels, and every field of a launch, looked at by some case? Half an hour and more.
mutation: $(VENV)/.built
	PYTHONPATH=tests $(BIN)/python -m proof.mutate
	PYTHONPATH=tests $(BIN)/python -m proof.parameters

# Launches, copies and waits of each step, beside those of diffusers and k-diffusion.
launches: $(VENV)/.built
	PYTHONPATH=tests $(BIN)/python -m counter.table

# What a call of the step costs from Python, by GPU backend, without the launch: why one of them is the default.
launch-cost: $(VENV)/.built
	$(BIN)/python -m benchmarks.launch_cost

# The wheel for CUDA, built against a CUDA build of torch in build/cuda and looked at without a GPU; says so where it cannot be.
cuda-build:
	PYTHON=$(PYTHON) tests/packaging/cuda_build.sh

# The golden digests under the oldest and the newest Python, torch and Triton. 20 GB in build/matrix.
matrix: $(VENV)/.built cuda-build
	$(BIN)/python tests/packaging/matrix.py

# The C++ tests under AddressSanitizer and UBSan. Leak checks are off: Python itself would fail them.
sanitize: $(VENV)/.built
	FASTDIFF_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib build/sanitize/lib
	PYTHONPATH=build/sanitize/lib LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(BIN)/pytest -q tests/cpp -k "not 2_to_the_31 and not instruction"

# The wheel in an empty environment, outside the checkout, with and without C++.
wheel-test: $(VENV)/.built
	tests/packaging/wheel_test.sh native
	tests/packaging/wheel_test.sh pure

clean:
	rm -rf build dist demo fastdiff/*.so *.egg-info

$(VENV)/.installed: requirements.txt requirements-no-deps.txt
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing what requirements.txt pins (minutes the first time)"
	$(PIP) install --quiet -r requirements.txt
	$(PIP) install --quiet --no-deps -r requirements-no-deps.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@echo "building fastdiff"
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@touch $@
