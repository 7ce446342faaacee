PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow test-deepspeed test-loggers fuzz mutants lint types bench docs clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/gradwatch demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow or browser"

# DeepSpeed compiles an operator at its first start: some four minutes, once.
test-deepspeed: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel editables
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[deepspeed]"
	$(BIN)/python -m pytest -q -n 0 -m slow tests/modes/test_deepspeed.py

# Aim and Trackio want an older filelock and an older pillow than the rest: an environment of their own, over this one.
test-loggers: $(STAMP)
	$(PYTHON) -m venv $(VENV)-loggers
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(VENV)-loggers/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/gradwatch.pth"
	$(VENV)-loggers/bin/python -m pip install --quiet -c constraints.txt "aim>=3.29" "trackio>=0.43"
	$(VENV)-loggers/bin/python -m pytest -q -n 0 -m "slow or not slow" tests/sinks/test_loggers.py tests/callbacks/test_trackio.py

fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz

mutants: $(STAMP)
	$(BIN)/python -m tools.mutants

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/overhead.py

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) $(VENV)-loggers build dist docs/_build test-artifacts
