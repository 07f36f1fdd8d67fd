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

# Tests that only compute run two at a time; those with processes and clocks run alone.
COMPUTING := $(wildcard tests/test_cuda_*.py tests/test_exact_*.py tests/test_faults.py \
	tests/test_distribution.py tests/test_heads.py tests/test_one_pass.py tests/test_random_weights.py \
	tests/test_schedule*.py tests/test_ui_*.py tests/test_tree.py tests/test_cli_trees.py \
	tests/test_bench_*.py tests/test_calibrate_*.py tests/test_train_*.py tests/test_weights.py \
	tests/test_layers.py tests/test_choose.py tests/test_engine_limits.py \
	tests/test_answer_output.py)

test: setup
	$(BIN)/python -m pytest -n 2 $(COMPUTING)
	$(BIN)/python -m pytest $(addprefix --ignore=,$(COMPUTING))

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
