# make demo: everything from a fresh clone to a scored data set. make test: the same, to green tests.
# Both need Python 3.10 or later with venv, and a C++17 compiler (GCC or Clang).
PYTHON ?= python3
VENV ?= .venv
# This exact version resolves to a CPU build where one is offered. Leave it empty to keep a torch
# that the environment already has: make test TORCH=
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
# Files of tests side by side: one more than there are cores, since some wait for other processes.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n + 1 : 8)))
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
PIP := $(BIN)/python -m pip install --quiet --no-compile
# What pip would do with one core, for all modules but packages' own tests; it, too, passes over
# files that are no valid Python, templates for example.
COMPILE = $(BIN)/python -m compileall -qq -j 0 -x '/(tests|rllib)/' $(VENV)/lib || true

.PHONY: demo test bench lint docs doctor clean

demo: $(VENV)/ready
	$(BIN)/python -m examples.digits --out demo-output

test: $(VENV)/test-ready
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

bench: $(VENV)/ready
	$(BIN)/python -m bench.report

doctor: $(VENV)/ready
	$(BIN)/python -m fastfi.doctor

lint: $(VENV)/ready
	$(BIN)/python -m pip install --quiet "ruff>=0.11" "mypy>=1.11"
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The site, in site/; warnings are errors. Nothing in it is loaded from elsewhere.
docs: $(VENV)/ready
	$(BIN)/python -m pip install --quiet "fastfi[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The editable install builds fastfi/_C in the source tree; changed sources build it again.
$(VENV)/ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH),$(PIP) "$(TORCH)")
	$(PIP) --editable ".[examples]"
	$(COMPILE)
	touch $@

# What only the tests need, Ray among it; fastfi itself is there already.
$(VENV)/test-ready: $(VENV)/ready
	$(PIP) "fastfi[test]"
	$(COMPILE)
	touch $@

clean:
	rm -rf build dist site *.egg-info fastfi/_C.*.so demo-output
