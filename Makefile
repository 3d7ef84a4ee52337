# Everything needs only Python 3.11 or later and make; each target installs what it needs into .venv, once.
#   make demo    experiments on a small language model, with a heat map        (PYTHON=python3.12 picks an interpreter)
#   make test    the tests
#   make check   ruff and mypy
#   make bench   the benchmarks, into benchmarks/results/

PYTHON ?= python3
BIN := .venv/bin
PEERS := nnsight transformer_lens pyvene
# Python compiles what it imports when it is first imported: to compile all of torch beforehand takes a minute.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.PHONY: help demo test check bench clean
.DELETE_ON_ERROR:

help:
	@sed -n '2,5s/^# *//p' Makefile

demo: .venv/installed-demo
	@$(BIN)/nnsightc demo

test: .venv/installed-test
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: .venv/installed-check
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: .venv/installed-test $(PEERS:%=benchmarks/.venv-%/installed)
	@$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv $(PEERS:%=benchmarks/.venv-%) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

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

# Each peer has an environment of its own: it need not agree with ours, or with another, on any version. One that cannot
# be installed is left out of the benchmarks, which say so. torch comes first, as above.
benchmarks/.venv-%/installed: constraints.txt
	@echo "installing $(PACKAGE_$*) for comparison"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile torch==2.13.0 \
		&& $(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
			torch==2.13.0 transformers==5.23.0 $(PACKAGE_$*) \
		|| { echo "$(PACKAGE_$*) cannot be installed here: its figures are left out"; rm -rf $(@D)/bin; }
	@touch $@

PACKAGE_nnsight := nnsight==0.8.1
PACKAGE_transformer_lens := transformer-lens==3.9.0
PACKAGE_pyvene := pyvene==0.1.8
