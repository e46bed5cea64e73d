PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

$(BIN)/onnxq: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

dev: $(BIN)/onnxq  ## make a virtual environment with the project and its tools

demo: $(BIN)/onnxq  ## compile the model that ships and print accuracy before and after
	$(BIN)/onnxq compile models/digits_cnn.onnx -o digits_cnn_int8.onnx --calib models/digits_calib.npz
	$(BIN)/onnxq evaluate models/digits_cnn.onnx --data models/digits_test.npz
	$(BIN)/onnxq evaluate digits_cnn_int8.onnx --data models/digits_test.npz

test: dev  ## run the tests (a few minutes); ONNXQ_DATA=DIR adds the tests on real models
	$(BIN)/python -m pytest

lint: dev  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: dev  ## rewrite style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: dev  ## check types
	$(BIN)/mypy

bench: dev  ## measure everything that README and docs quote (ONNXQ_DATA needed)
	$(BIN)/python bench/run.py

docs: dev  ## write the pages and tables that follow from passes and results
	$(BIN)/python docs/passes.py
	$(BIN)/python bench/table.py

clean:  ## remove what the build and the tools leave
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis digits_cnn_int8.onnx

.PHONY: help dev demo test lint format types bench docs clean
