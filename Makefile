# make demo: set up and answer one prompt. make test: the whole suite. make check: lint and types.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA GPU, torch's own index has a CPU build of the same version, which is much
# smaller; where that index cannot be reached, the default wheel does as well.
CPU_INDEX := https://download.pytorch.org/whl/cpu
PROBE := import urllib.request as u; u.urlopen("$(CPU_INDEX)/torch/", timeout=5)

.PHONY: demo test check setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	if ! command -v nvidia-smi >/dev/null && $(PYTHON) -c '$(PROBE)' 2>/dev/null; \
	then $(BIN)/python -m pip install -q -c constraints.txt torch --extra-index-url $(CPU_INDEX); \
	else $(BIN)/python -m pip install -q -c constraints.txt torch; fi
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/ppsd generate --model smollm2-135m --timeline --max-new-tokens 96 \
		--prompt 'Why is the sky blue?'

# Tests run two at a time, but for those that measure how soon something happens: they run alone.
# Threads of a test that takes several wait asleep there, not spinning on the other test's core.
TIMED := $(addprefix tests/,test_failures.py test_distributed_torchrun.py test_imports.py)

test: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal \
		$(addprefix --ignore=,$(TIMED))
	$(BIN)/python -m pytest $(TIMED)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
