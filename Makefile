# Hearth: `make serve` and `make test` do all their own set-up. `make help` lists the rest.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: help setup serve test lint format bench gpu-check lock clean

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: ## Virtual environment with every pinned dependency (once; then at once)
	@$(PYTHON) scripts/setup.py --venv $(VENV)

serve: setup ## Serve every model of the profile on http://127.0.0.1:8000/v1 (ARGS="--port 9000")
	@exec $(BIN)/hearth serve $(ARGS)

test: setup ## The whole suite, real engines included (ARGS="-m 'not engines'" for the fast part)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)

lint: setup ## ruff (format and lint) and mypy --strict
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: setup ## Rewrite the code in the house style
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: setup ## Every benchmark that runs on this machine; results in benchmarks/results/
	@$(BIN)/python -m benchmarks.startup
	@$(BIN)/python -m benchmarks.gateway
	@$(BIN)/python -m benchmarks.fairness
	@$(BIN)/python -m benchmarks.ledger_crash --rounds 120
	@$(BIN)/python -m benchmarks.sleep
	@$(BIN)/python -m benchmarks.moe
	@$(BIN)/python -m benchmarks.eplb

gpu-check: setup ## On one GPU: sleep, wake, first answer, memory against the plan (ARGS="--rehearse" on a CPU)
	@$(BIN)/python -m benchmarks.gpu_check $(ARGS)

lock: setup ## Resolve and pin all versions anew (requirements/*.txt)
	@$(BIN)/python scripts/lock.py

clean: ## Remove the environment, caches and built files; keeps var/ (keys, weights, logs)
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis tests/e2e/js/node_modules
	@find . -name __pycache__ -type d -not -path './var/*' -prune -exec rm -rf {} +
