# The verbs of this project. Everything is installed into $(VENV); only Python 3.11 or newer must be there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Options for the program behind a verb: make serve ARGS="--http-listen 127.0.0.1:9000"
ARGS ?=

# What an installation depends on: its requirements, and the code that it compiles.
INSTALLED := pyproject.toml $(wildcard percepnet/native/*.[ch])

# What `make train` reads and writes.
DATA ?= data
CACHE ?= cache/train
RUN ?= runs/main
# DNSMOS's sig_bak_ovr.onnx and model_v8.onnx, from github.com/microsoft/DNS-Challenge, DNSMOS/DNSMOS.
DNSMOS ?= data/dnsmos
VERSION ?= 0.0.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test lint format bench image train clean

help: ## Show the verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

serve: $(VENV)/.service ## Install the service and start it on its bundled model, port 8080
	exec $(BIN)/percepnet serve $(ARGS)

test: lint ## Install the tools; check lint, format and types; run the tests (those of training if PyTorch is there)
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev ## Check lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.service ## Measure what streams and files cost on this machine
	$(BIN)/percepnet bench $(ARGS)

image: $(VENV)/.created ## Take the steps of deploy/Dockerfile without Docker, and use what they build
	$(BIN)/python tests/deploy/exercise_image.py

# PyTorch comes in many builds: install the one for your machine into $(VENV) first, or get the default one.
train: $(DNSMOS) $(VENV)/.train $(CACHE)/cache.json ## Train the model: prepare DATA, train (goes on after a stop), export, evaluate
	$(BIN)/percepnet train $(CACHE) $(RUN)/narrow --config percepnet/training/narrow.json $(ARGS)
	$(BIN)/percepnet train $(CACHE) $(RUN)/wide --config percepnet/training/wide.json \
		--start-from $(RUN)/narrow/checkpoint.pt $(ARGS)
	$(BIN)/percepnet train $(CACHE) $(RUN)/judged --config percepnet/training/judged.json \
		--start-from $(RUN)/wide/checkpoint.pt --dnsmos $(DNSMOS) $(ARGS)
	$(BIN)/percepnet export $(RUN)/judged $(RUN)/model --version $(VERSION)
	$(BIN)/percepnet evaluate --clean $(DATA)/dev/clean --noisy $(DATA)/dev/noisy --model $(RUN)/model

$(CACHE)/cache.json: | $(VENV)/.train
	$(BIN)/percepnet prepare $(CACHE) --speech $(DATA)/train/speech.csv --noise $(DATA)/train/noise.csv \
		--rooms $(DATA)/train/rir.csv

clean: ## Remove the environment and what tools leave behind; keep cache/ and runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "percepnet needs Python 3.11 or" \
		"newer; $(PYTHON) is not. Name one that is: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.service: $(INSTALLED) | $(VENV)/.created
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(INSTALLED) | $(VENV)/.created
	$(PIP) --editable '.[dev]'
	@$(PIP) --editable '.[measure]' 2>$(VENV)/measure.log || \
		echo "The measures could not be installed; PESQ needs a C compiler. Their tests will be skipped."
	@touch $@

$(VENV)/.train: $(INSTALLED) | $(VENV)/.created
	$(PIP) --editable '.[train]'
	@touch $@
