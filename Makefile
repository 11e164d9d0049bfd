# The one door: what people, hooks and CI run. `make help` lists it.
#
#   make demo                 a picture from a real queue, and nothing left behind
#   make setup TORCH=cpu      choose the build of torch: cpu, cu130, …; without TORCH it is what pip finds
#   make setup PYTHON=python3.12

PYTHON ?= python3
TORCH ?=
VENV ?= .venv
BIN := $(VENV)/bin
SETTINGS := $(TORCH) $(PYTHON)
STAMP := $(VENV)/.setup-done
PYTEST_ARGS ?=
# Files of tests that run at a time; most of their time is waiting.
TEST_PROCESSES ?= 2
CAMPAIGN_JOBS ?= 1000
CAMPAIGN_FAULTS ?= 100
EXTRAS := worker,speech,embedded,flower,otel,s3,bench,dev

# One pip and one uv that were tried with the constraints.
PIP_PIN := pip==26.3
UV_PIN := uv>=0.9,<1

.DEFAULT_GOAL := help
.PHONY: help setup demo up test test-faults check format bench docs train-shapes secrets clean FORCE

help: ## list what there is
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sort | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv with the pinned versions (TORCH=cpu|cu130, PYTHON=…)

# Changed by a change of TORCH or PYTHON alone, so that a second `make setup` has nothing to do.
$(VENV)/.settings: FORCE
	@if [ -n "$(filter command line environment,$(origin TORCH) $(origin PYTHON))" ] || [ ! -f $@ ]; then \
	  mkdir -p $(VENV) && { [ "$$(cat $@ 2>/dev/null)" = "$(SETTINGS)" ] || echo "$(SETTINGS)" > $@; }; \
	fi

$(STAMP): pyproject.toml constraints.txt $(VENV)/.settings
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "There is no '$(PYTHON)' here. Install Python 3.11 or newer, or name yours: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "'$(PYTHON)' is $$($(PYTHON) -V 2>&1), and 3.11 or newer is needed. Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no venv module. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing the pinned versions into $(VENV); with torch this takes some minutes the first time."
	@[ "$$($(BIN)/python -V 2>/dev/null)" = "$$($(PYTHON) -V)" ] || rm -rf $(BIN) $(VENV)/lib # another Python's
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(PIP_PIN)'
ifeq ($(strip $(TORCH)),)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt 'torch==2.13.0' -e '.[$(EXTRAS)]'
else
	$(BIN)/python -m pip install --disable-pip-version-check --quiet '$(UV_PIN)'
	$(BIN)/uv pip install --python $(BIN)/python --torch-backend $(TORCH) -c constraints.txt 'torch==2.13.0' -e '.[$(EXTRAS)]'
endif
	@touch $@

demo: setup ## submit a job over HTTP to a system of its own, watch it, save the picture
	@$(BIN)/omnirt demo

up: setup ## broker, worker and gateway in the foreground, until Ctrl-C
	@$(BIN)/omnirt up

test: setup ## the whole test suite, on a real broker that it starts itself
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

test-faults: setup ## the fault tests alone, the campaign at full length (CAMPAIGN_JOBS, _FAULTS, _SEED)
	CAMPAIGN_JOBS=$(CAMPAIGN_JOBS) CAMPAIGN_FAULTS=$(CAMPAIGN_FAULTS) $(BIN)/python -m pytest tests/faults -s $(PYTEST_ARGS)

check: setup ## format, lint, types, import direction
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports

format: setup ## format the code, and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## write docs/models.md anew from the registry
	@$(BIN)/omnirt models --markdown > docs/models.md

bench: setup ## measure; the figures go to docs/performance.md
	@$(BIN)/omnirt bench

train-shapes: setup ## train the demonstration model again, from its seed
	$(BIN)/python -m workers.training.shapes train
	$(BIN)/python -m workers.training.shapes evaluate

secrets: ## make the secret files of docker-compose.yml, once
	@docker/make-secrets

clean: ## remove .venv and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
