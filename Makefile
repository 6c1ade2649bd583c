# `make demo` and `make test` work on a fresh machine with Python >= 3.10: each makes .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench hardware clean

demo: $(VENV)/ready
	$(BIN)/fewbits demo --out runs/demo

test: $(VENV)/ready
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python -m pip install --quiet -r benchmarks/requirements.txt
	$(BIN)/python -m benchmarks.qat_cost
	$(BIN)/python -m benchmarks.deploy
	$(BIN)/python -m benchmarks.onnx_zoo
	$(BIN)/python -m benchmarks.cifar10_qat

# Needs Debian's iverilog, yosys and qflow-tech-osu018; says so where they are not there.
hardware: $(VENV)/ready
	$(BIN)/python -m hardware.measure

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[models,dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
