# make demo: build, and draw pictures.   make test: build, and test.   Both make .venv if need be; nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml fastdiff/ops.schema $(shell find csrc -type f)
WORKERS ?= 2

.PHONY: demo test bench zoo sanitize wheel-test clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(BIN)/fastdiff demo --out demo

test: $(VENV)/.built
	$(BIN)/pytest -n $(WORKERS) --dist worksteal tests

bench: $(VENV)/.built
	@mkdir -p benchmarks/results/local
	$(BIN)/pytest -q benchmarks -p no:xdist --benchmark-json benchmarks/results/local/bench.json --ratios benchmarks/results/ratios.json

zoo: $(VENV)/.built
	$(BIN)/python -m benchmarks.zoo.train all

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
