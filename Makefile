# `make help` lists the targets. Everything happens inside .venv; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
STAMP := $(VENV)/.installed
# enough to run: everything if it is there already, else the package without extras and tools
RUN = $(if $(wildcard $(STAMP)),$(STAMP),$(CORE))

.DEFAULT_GOAL := help
.PHONY: help install demo sweep results test test-slow lint format docs wheel-test clean

help:  ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# One pip call for everything: torch and torchvision must come from the same place to fit each other.
define install
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (minutes, the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable "$(1)"
	@touch $@
endef

$(CORE): pyproject.toml
	$(call install,.)

$(STAMP): pyproject.toml
	$(call install,.[dev])

install: $(STAMP)  ## Make .venv and install the package with its development tools

demo: $(RUN)  ## Run the main job on scikit-learn's digits and print the result table
	$(BIN)/python -m iciia_exp -m method=linear_head,iciia groups=1,16

sweep: $(RUN)  ## Accuracy against overhead: five group counts, three times with all seeds varied
	$(BIN)/python -m iciia_exp -m method=linear_head,iciia groups=1,4,16,64,max seed=0,1,2 \
	  'partition.seed=$${seed}' 'backbone.seed=$${seed}'

results: $(STAMP)  ## Run a table of the documents: make results TABLE=digits ARGS="--data FOLDER"
	$(BIN)/python benchmarks/results.py $(TABLE) $(ARGS)

test: $(STAMP)  ## Run the tests, without the slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(STAMP)  ## Run the slow tests: whole commands, processes, every method the whole way
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

lint: $(STAMP)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## Build the documentation in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

wheel-test: $(STAMP)  ## Build the wheel and run it from another folder: the configuration must be inside
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target "$$folder/site" dist/iciia_exp-*.whl; \
	test -f "$$folder/site/iciia_exp/py.typed"; \
	python=$(abspath $(BIN))/python; cd "$$folder"; \
	PYTHONPATH="$$folder/site" "$$python" -c "import iciia_exp; assert '/site/' in iciia_exp.__file__, iciia_exp.__file__"; \
	ICIIA_EXP_CACHE="$$folder/cache" PYTHONPATH="$$folder/site" "$$python" -m iciia_exp trainer=smoke logger=csv

clean:  ## Remove .venv and build products; run directories and the cache stay
	rm -rf $(VENV) dist build *.egg-info .pytest_cache .ruff_cache .mypy_cache
