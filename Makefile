# One command each. Everything is installed into .venv, with the versions of constraints.txt.
# The newest Python that is supported and runs; a shim of a version that is not there does not count.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# One thread a process: small models gain nothing from more, and the tests run side by side.
export OMP_NUM_THREADS ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: demo test lint types docs pytest oldest audit bench format clean

demo: .venv/installed
	$(BIN)/dicache demo

test: lint types docs pytest

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/installed
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs

pytest: .venv/installed .venv/extra/installed
	$(BIN)/pytest -n 2 --dist worksteal

# What the oldest supported versions of the libraries make of the survey, the replay, the profiler and the command line.
# All but torch, whose older builds on PyPI bring CUDA along, some gigabytes: `make oldest TORCH=2.7.0`, in a fresh .venv-oldest.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n 2 --dist worksteal -k "not killed" tests/anatomy tests/schedules tests/profiler \
		tests/runtime/test_oracle.py tests/runtime/test_adaptive.py
	.venv-oldest/bin/dicache demo --model scenes --runs 2 --steps 6 --images 2 -o build/oldest

# Known vulnerabilities of the versions of constraints.txt, as PyPI's database has them.
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

bench: .venv/installed
	$(BIN)/python -m benchmarks.replay

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Beside the environment's packages, where diffusers would import it, and warn, in every command.
.venv/extra/installed: .venv/installed constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --target .venv/extra torchao
	touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt torch==$(TORCH) -e . \
		hatchling hypothesis jsonschema peft pytest pytest-xdist
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-audit demo profiles dist build
