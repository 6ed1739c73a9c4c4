# `make demo` and `make test` set up everything they need in `.venv`, once. `make style` fixes, `make check` only looks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.PHONY: demo test test-slow style check clean

demo: $(READY)
	$(BIN)/flashdlm demo

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

style: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

# Installed again only when the pins or the package's metadata change.
$(READY): tests/requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r tests/requirements.txt
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@
