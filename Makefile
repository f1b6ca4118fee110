VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: help setup demo lint test test-fast coverage

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(VENV)/.done ## Make the virtual environment with pinned versions

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all,dev,s3]'
	touch $@

demo: setup ## Run the main job on the embedded default and print where the release and the report are
	$(BIN)/polyconcept run examples/miniature/batch.yaml --output runs/demo

lint: setup ## Check format, lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint k8s/Dockerfile

test: setup lint ## Run the tests
	$(BIN)/pytest -q -n 2 --dist loadfile

test-fast: setup ## Run the tests that are not marked slow
	$(BIN)/pytest -q -n 2 --dist loadfile -m 'not slow'

coverage: setup ## Run the tests and print the share of lines that ran (child processes are not counted)
	$(BIN)/pytest -q -n 2 --dist loadfile --cov=pipeline --cov=ray_jobs --cov=retrieval --cov=training
