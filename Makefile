# Two commands do everything: `make demo` and `make test`. Both set up .venv on first use.
# On a machine without a GPU, point pip at PyTorch's CPU wheels first; CONTRIBUTING.md says how.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
TEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
FUZZ_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DELETE_ON_ERROR:
.PHONY: demo test lint bench fuzz clean venv

demo: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh $(DEMO_ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) $(TEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(READY)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# A million mutated inputs through everything that reads a stranger's bytes; some minutes.
# FUZZ_ARGS="--inputs 5000 --seconds 20" is a short run; --help lists the rest.
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

venv: $(READY)

# Installed again only when what is to be installed has changed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moshi-fl needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	@echo "Setting up $(VENV) (once; takes a minute or two) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable . --group test --group lint
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--constraint constraints.txt --group oracle
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
