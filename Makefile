# Everything needs only Python 3.11 or later and make; each target installs what it needs into .venv, once.
#   make demo    experiments on a small language model, with a heat map        (PYTHON=python3.12 picks an interpreter)
#   make test    the tests
#   make check   ruff and mypy
#   make bench   the benchmarks, into benchmarks/results/

PYTHON ?= python3
BIN := .venv/bin
PEER := benchmarks/.venv-nnsight
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test check bench clean
.DELETE_ON_ERROR:

help:
	@sed -n '2,5s/^# *//p' Makefile

demo: .venv/installed-demo
	@$(BIN)/nnsightc demo

test: .venv/installed-test
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: .venv/installed-check
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: .venv/installed-test $(PEER)/installed
	@$(BIN)/python benchmarks/run.py --peer $(PEER)/bin/python

clean:
	rm -rf .venv $(PEER) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@echo "making .venv"
	@$(PYTHON) -m venv .venv
	@touch $@

# torch alone and first: it is most of the download, and what follows then finds it there.
.venv/installed-torch: .venv/created constraints.txt
	@echo "installing torch (the largest part: some minutes on a slow line)"
	@$(INSTALL) torch
	@touch $@

.venv/installed-demo: .venv/installed-torch pyproject.toml
	@echo "installing nnsight-compiler with what the demo needs"
	@$(INSTALL) --editable '.[demo]'
	@touch $@

.venv/installed-test: .venv/installed-torch pyproject.toml
	@echo "installing nnsight-compiler with what the tests need"
	@$(INSTALL) --editable '.[test]'
	@$(INSTALL) --editable '.[test,parity]' \
		|| echo "nnsight 0.8.1 cannot be installed here: the tests that compare with it are skipped"
	@touch $@

.venv/installed-check: .venv/installed-torch pyproject.toml
	@echo "installing nnsight-compiler with ruff and mypy"
	@$(INSTALL) --editable '.[check]'
	@touch $@

# nnsight has its own environment: it need not agree with ours on any version. Where it cannot be installed, the
# benchmarks say so and go on without it.
$(PEER)/installed:
	@echo "installing nnsight 0.8.1 for comparison"
	@$(PYTHON) -m venv $(PEER)
	@$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 nnsight==0.8.1 \
		|| { echo "nnsight 0.8.1 cannot be installed here: its figures are left out"; rm -rf $(PEER)/bin; }
	@touch $@
