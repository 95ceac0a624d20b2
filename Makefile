# Thin names for the commands of the README. `make` alone lists them.
#
# Two environments: .venv holds the gateway's dependencies and nothing else, as a server would have
# them; .venv-dev holds everything, from torch to ruff. So the tests cannot hide a dependency that
# the gateway lacks, and `make serve` stays quick and small.

PYTHON ?= python3
ARGS ?=

CORE := .venv
DEV  := .venv-dev
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help serve triton dev test lint types imports core train evaluate export bench bench-gpu loadtest lock clean distclean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1~/' | awk -F'~' '{printf "%-18s %s\n", $$1, $$2}'

serve: $(CORE)/.complete  ## the gateway; ARGS='--port 9000' passes flags on
	$(CORE)/bin/alexnet serve $(ARGS)

triton: $(CORE)/.complete  ## a local Triton server on model_repository/; ARGS='--grpc-port 9001'
	$(CORE)/bin/alexnet triton $(ARGS)

dev: $(DEV)/.complete  ## the full environment: .venv-dev

test: lint types imports core  ## all checks, then the tests; ARGS='-k page' passes flags to pytest
	$(DEV)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(DEV)/.complete  ## ruff
	$(DEV)/bin/ruff check .

types: $(DEV)/.complete  ## mypy, strict
	$(DEV)/bin/mypy

imports: $(DEV)/.complete  ## who may import whom
	$(DEV)/bin/lint-imports --no-logo

core: $(CORE)/.complete  ## the gateway's own environment suffices for the gateway
	$(CORE)/bin/python -c 'import alexnet, serving.server, sys; assert "torch" not in sys.modules'

train: $(DEV)/.complete  ## alexnet train; ARGS=DATA
	$(DEV)/bin/alexnet train $(ARGS)

evaluate: $(DEV)/.complete  ## alexnet evaluate; ARGS='MODEL DATA'
	$(DEV)/bin/alexnet evaluate $(ARGS)

export: $(DEV)/.complete  ## alexnet export; ARGS=CHECKPOINT
	$(DEV)/bin/alexnet export $(ARGS)

bench: $(DEV)/.complete  ## the gateway beside FastAPI, LitServe, BentoML, Ray Serve; ARGS='--data DATA'
	$(DEV)/bin/python loadtest/bench.py $(ARGS)

bench-gpu: $(DEV)/.complete  ## torch, ONNX Runtime and TensorRT on an NVIDIA GPU; ARGS='--json FILE'
	$(DEV)/bin/python loadtest/bench_gpu.py $(ARGS)

loadtest: $(DEV)/.complete  ## how much a gateway can answer, and how soon: a report; ARGS='--images FOLDER'
	$(DEV)/bin/python loadtest/load_test.py $(ARGS)

lock: $(DEV)/.complete  ## newest versions that pyproject.toml allows -> constraints.txt
	$(DEV)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	{ sed '/^[^#]/d' constraints.txt; \
	  $(DEV)/bin/python -m pip freeze --exclude-editable --exclude setuptools \
	  | grep -vE '^(nvidia-|cuda-|triton==)' | sed 's/+[a-z0-9.]*$$//'; } > constraints.new
	mv constraints.new constraints.txt
	touch $(DEV)/.complete

clean:  ## caches and build leftovers
	rm -rf build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## also the environments, and what `make bench` keeps
	rm -rf $(CORE) $(DEV) .bench

$(CORE)/.complete: $(INPUTS)
	$(call environment,$(CORE))
	@echo 'Installing the gateway into $(CORE) (under a minute; no torch) ...'
	$(call install,$(CORE),.)
	@touch $@

$(DEV)/.complete: $(INPUTS)
	$(call environment,$(DEV))
	@echo 'Installing everything into $(DEV) (minutes: torch is large) ...'
	$(call install,$(DEV),.[dev])
	@touch $@

# The environment $(1), made anew where it is absent, or half made.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "alexnet-serving needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
	       "Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(1)/bin/pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
endef

define install
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '$(2)'
endef
