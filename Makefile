# Everything from a bare Python 3.11 to 3.13: `make quickstart`, `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
WORKDIR ?= runs/quickstart

# Python keeps what it compiles: without that each process compiles JAX anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart test test-slow test-all test-soak lint

help:
	@echo 'make quickstart  install, train on real digits, evaluate: minutes'
	@echo 'make test        ruff and the tests'
	@echo 'make test-slow   tests that take minutes'
	@echo 'make test-all    both in one go, as CI does'
	@echo 'make test-soak   tests that take longer than CI has'
	@echo 'PYTHON=python3.12, VENV=.venv and WORKDIR=runs/quickstart may be set.'

quickstart: $(VENV)/ready
	$(RUN) -m drnet_jax.main --config=quickstart --workdir=$(WORKDIR)

# What tests compile, for the next run; JAX's key holds flags and versions. Cut
# off while it was written? rm -r .venv/programs
test test-slow test-all test-soak: \
  export JAX_COMPILATION_CACHE_DIR ?= $(abspath $(VENV))/programs

PYTEST = $(RUN) -m pytest -q -rfEs --durations 40

test: lint
	$(PYTEST) -n 2 --dist loadfile -m 'not slow'

# Kills, several processes, every network, real weights on real photographs.
test-slow: $(VENV)/ready
	$(PYTEST) -n 2 --dist loadfile -m 'slow and not soak'

# In one session, what the tests of a file share is made once for the quick and
# the slow.
test-all: lint
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m 'not soak'

# What CI has no time for: ten kills, twenty faults of two processes, every
# network at every size, a sweep, a thousand exported photographs, the notebook,
# every command of the docs.
test-soak: $(VENV)/ready
	$(PYTEST) -m soak
	DRNET_JAX_KILLS=10 $(PYTEST) tests/test_run.py -k killed

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(VENV)/ready: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; " \
	  "try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check uv
	$(RUN) -m uv pip install -q --python $(RUN) -e '.[test]'
	touch $@
