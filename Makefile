# Each target does all of its own set-up, and a second call reuses what the first made.
# The folder's name may hold spaces: make's own targets cannot, so set-up is a phony target that compares
# a stamp in the environment, and every path in a recipe is quoted.

VENV ?= .venv
UNSLOTH_VENV ?= .venv-unsloth
PROFILE ?= cpu
LESSON ?=
SEED ?=
ARGS ?=
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

PY = "$(VENV)/bin/python"
COURSE = $(PY) -m course_lib
STAMP = "$(VENV)/.course-stamp"
# The editable install points to this folder, so a moved checkout has another key too.
KEY = $$({ cat requirements.txt pyproject.toml; pwd; } | cksum)
READY = [ "$(KEY)" = "$$(cat $(STAMP) 2>/dev/null)" ] && $(PY) -c "" 2>/dev/null
SUPPORTED = -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"

.PHONY: help course test test-unsloth lab check refresh reference bench clean setup install model
.DEFAULT_GOAL := help

help: ## list the targets
	@echo "usage: make TARGET [LESSON=01] [PROFILE=ci|cpu|full|t4] [ARGS=...] [VENV=.venv] [PYTHON=python3.12]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' Makefile

course: model ## run every lesson (or LESSON=..) and write the report
	@$(COURSE) run $(LESSON) --profile $(PROFILE) $(ARGS)

# Two files at a time: most of a lesson, and nearly all of a unit test, runs on one core. A file's own tests keep their order.
test: model ## run the whole test suite, every notebook in profile ci included
	@$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

test-unsloth: model ## lesson 05 through unsloth's CPU back end, in an environment of its own
	@$(PY) tests/with_unsloth/environment.py "$(UNSLOTH_VENV)"
	@"$(UNSLOTH_VENV)/bin/python" -m pytest tests/with_unsloth $(ARGS)

lab: model ## open JupyterLab on a working copy of the notebooks
	@$(COURSE) lab $(ARGS)

check: setup ## lint, format, notebook gates, index and data checks; before every commit
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(COURSE) check

refresh: model ## run the notebooks in profile cpu and store their outputs in place
	@$(COURSE) refresh $(LESSON) $(ARGS)

reference: model ## run profile full piece by piece, for the stored reference data
	@$(COURSE) reference $(LESSON) $(if $(SEED),--seed $(SEED)) $(ARGS)

bench: model ## measure the course's speed against TRL's defaults
	@$(COURSE) bench $(ARGS)

clean: ## remove what the course made, never anything else
	@if $(PY) -c "import course_lib" 2>/dev/null; then $(COURSE) clean $(ARGS); else echo "Nothing to clean: $(VENV) has not been set up."; fi

model: setup
	@$(COURSE) fetch

# Two makes at once share one environment: the second waits and finds the work done. A directory can be
# locked itself, so that no lock file is left behind. Where flock is missing (macOS) there is no lock.
# Make runs a line with $(MAKE) in it even where it is only to print (`make -n`): that line makes no folder itself.
setup:
	@{ $(READY); } || mkdir -p "$(VENV)"
	@{ $(READY); } || [ ! -d "$(VENV)" ] || { \
	  if command -v flock >/dev/null; then \
	    flock --nonblock "$(VENV)" true || echo "Another make is setting up $(VENV): waiting for it."; \
	    flock "$(VENV)" $(MAKE) --no-print-directory install; \
	  else \
	    $(MAKE) --no-print-directory install; \
	  fi; \
	}

install:
	@if { $(READY); }; then exit 0; fi; \
	set -e; \
	rm -f $(STAMP); \
	if ! $(PY) $(SUPPORTED) 2>/dev/null || ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  if [ -x $(PY) ] && [ ! -f "$(VENV)/pyvenv.cfg" ]; then \
	    echo "error: $(VENV) holds a Python that the course does not support (3.11, 3.12 or 3.13 with pip is needed), and it is not a virtual environment that could be made anew. Pass another place: make VENV=..." >&2; exit 2; \
	  fi; \
	  python=; \
	  for candidate in $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3.13 python3); do \
	    if "$$candidate" $(SUPPORTED) 2>/dev/null; then python=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "error: no Python 3.11, 3.12 or 3.13 found (looked for: $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3.13 python3)). Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; \
	  fi; \
	  echo "Making $(VENV) with $$("$$python" --version)."; \
	  if [ -f "$(VENV)/pyvenv.cfg" ]; then clear=--clear; else clear=; fi; \
	  if ! "$$python" -m venv $$clear "$(VENV)" >/dev/null 2>&1; then \
	    "$$python" -m venv --clear --without-pip "$(VENV)"; \
	    "$$python" -m pip --python $(PY) install --quiet pip; \
	  fi; \
	fi; \
	index=; \
	if [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then \
	  if $(PY) -c "import os, sys, threading, urllib.request as request; limit = threading.Timer(3, os._exit, [1]); limit.daemon = True; limit.start(); request.urlopen(sys.argv[1])" "$(TORCH_CPU_INDEX)/torch/" >/dev/null 2>&1; then \
	    echo "No NVIDIA driver found: PyTorch's CPU build is taken from $(TORCH_CPU_INDEX)."; \
	    index="--extra-index-url $(TORCH_CPU_INDEX)"; \
	  else \
	    echo "No NVIDIA driver found, and $(TORCH_CPU_INDEX) does not answer: PyTorch comes from pip's default index."; \
	  fi; \
	fi; \
	$(PY) -m pip install --disable-pip-version-check $$index -r requirements.txt; \
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .; \
	$(PY) -m pip install --disable-pip-version-check --quiet -c requirements.txt $$($(PY) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['reasoning'])") 2>/dev/null \
	  || echo "note: reasoning-gym could not be installed (it needs a C compiler): lesson 09 leaves out what needs it."; \
	echo "$(KEY)" > $(STAMP)
