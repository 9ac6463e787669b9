# What a fresh clone needs: Linux, Python 3.11 or newer with its headers and venv, gcc, make. Each target sets up the rest
# in .venv.
#
#   make demo     processes share a sparse file through real page faults
#   make test     the tests                       TESTS=tests/core  PYTEST_OPTIONS="-n 4 -x"
#   make soak     what takes too long for that: new random operations each time, a million pages   SEED=1
#   make lint     ruff and mypy
#   make bench    what it costs, beside what the same costs without it
#   make clean
#
# PYTHON=python3.12 takes another interpreter (after `make clean`, or with VENV=another-directory).

PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
PYTEST_OPTIONS ?= -n auto

# The package is installed as a user has it, not editable: what runs is the wheel, with the C extension in it. -P keeps
# the checkout's own dax_mp/, which has no extension, from being imported in its place.
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check
RUN := $(VENV)/bin/python -P
SOURCES := pyproject.toml setup.py README.md $(wildcard dax_mp/*.py dax_mp/mmu/* daemons/*.py clients/*.py)

.PHONY: demo test soak lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(VENV)/bin/dax-mp demo

test: $(VENV)/installed $(VENV)/extra-test
	$(RUN) -m pytest $(PYTEST_OPTIONS) $(TESTS)

# What it found wrong is found again with the SEED that it prints.
soak: SEED ?= $(shell date +%s)
soak: $(VENV)/installed $(VENV)/extra-test
	@echo "SEED=$(SEED)"
	DAX_MP_SOAK=$(SEED) $(RUN) -m pytest $(PYTEST_OPTIONS) tests/e2e/test_exerciser.py tests/e2e/test_limits.py
	DAX_MP_EVERY_BYTECODE=1 $(RUN) -m pytest $(PYTEST_OPTIONS) tests/e2e/test_interrupts.py

lint: $(VENV)/installed $(VENV)/extra-test $(VENV)/extra-lint
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

bench: $(VENV)/installed $(VENV)/extra-test
	$(VENV)/bin/python bench/run.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f dax_mp/mmu/*.so

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there: install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) .ci/prerequisites.py
	$(PYTHON) -m venv $(VENV)

# build/ is what setuptools takes old files from.
$(VENV)/installed: $(SOURCES) | $(VENV)/bin/python
	rm -rf build
	$(PIP) install .
	touch $@

# The optional dependencies of that name in pyproject.toml.
$(VENV)/extra-%: pyproject.toml | $(VENV)/bin/python
	$(RUN) -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*project["optional-dependencies"]["$*"], sep="\n")' > $(VENV)/requirements-$*.txt
	$(PIP) install -r $(VENV)/requirements-$*.txt
	touch $@
