# Everything from a bare Python 3.11 to 3.13: `make quickstart`, `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
WORKDIR ?= runs/quickstart

.PHONY: help quickstart test test-slow test-soak lint

help:
	@echo 'make quickstart  install, train on real digits, evaluate: minutes'
	@echo 'make test        ruff and the tests'
	@echo 'make test-slow   tests that take minutes'
	@echo 'make test-soak   tests that take longer than CI has'
	@echo 'PYTHON=python3.12, VENV=.venv and WORKDIR=runs/quickstart may be set.'

quickstart: $(VENV)/ready
	$(RUN) -m drnet_jax.main --config=quickstart --workdir=$(WORKDIR)

test: lint
	$(RUN) -m pytest -q -n 2 --dist loadfile --durations 10 -m 'not slow'

# Kills, several processes, every network, real weights on real photographs.
test-slow: $(VENV)/ready
	$(RUN) -m pytest -q -n 2 --dist worksteal --durations 10 -m 'slow and not soak'

# What CI has no time for: ten kills, twenty faults of two processes, a sweep,
# a thousand exported photographs, the notebook, every command of the docs.
test-soak: $(VENV)/ready
	$(RUN) -m pytest -q --durations 10 -m soak
	DRNET_JAX_KILLS=10 $(RUN) -m pytest -q tests/test_run.py -k killed

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
