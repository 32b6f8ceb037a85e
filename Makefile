# Two commands need nothing but Python 3.11 and make: `make demo` and `make test`.
# Each makes its own virtual environment (VENV) the first time, with the versions of constraints.txt.

VENV ?= .venv
# The first of these that runs and is new enough; `make PYTHON=/path/to/python` overrides.
PYTHON ?= $(shell unset PYTHONHOME PYTHONPATH; for p in python3.11 python3 python3.12 python3.13; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v "$$p"; break; }; done)
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# What belongs to another environment must not reach into ours.
unexport PYTHONHOME PYTHONPATH PYTHONSTARTUP PYTHONUSERBASE PYTHONWARNINGS PYTHONSAFEPATH
unexport VIRTUAL_ENV PIP_USER PIP_TARGET PIP_PREFIX PIP_CONSTRAINT PIP_REQUIREMENT
unexport PYTEST_ADDOPTS MYPYPATH
export PYTHONNOUSERSITE := 1

.NOTPARALLEL:
.PHONY: help demo test torture lint format types layers unit multirank servers venv clean

help:
	@echo 'make demo       train, kill, resume, reshard, damage: the whole story in a few minutes'
	@echo 'make test       lint, types, layers, unit tests, multi-rank tests'
	@echo 'make torture    the long forms of the failure tests: hours'
	@echo 'make lint       ruff; make format applies it'
	@echo 'make types      mypy --strict'
	@echo 'make layers     import-linter'
	@echo 'make unit       tests in one process; make multirank: tests on gloo ranks'
	@echo 'make servers    install sshd, if root and apt-get allow it; tests that need it are skipped else'
	@echo 'make venv       only the environment, in $(VENV)'
	@echo 'make clean      remove the environment and caches'

demo: venv
	$(BIN)/python docs/examples/demo.py $(DEMO_ARGS)

test: lint types layers unit multirank

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: venv
	$(BIN)/mypy

layers: venv
	$(BIN)/lint-imports

unit: venv
	$(BIN)/python -m pytest -n 2 -m 'not multirank and not torture' $(PYTEST_ARGS)

# One after the other: each test is several processes already.
multirank: venv
	$(BIN)/python -m pytest -m 'multirank and not torture' $(PYTEST_ARGS)

# Long tests: no dump of stacks after two minutes, which can crash a process that runs on.
torture: venv
	$(BIN)/python -m pytest -m torture --timeout=14400 -o faulthandler_timeout=0 -s $(PYTEST_ARGS)

# The S3 endpoint of the tests comes with the environment; sshd is a package of the system. Not a
# part of `make test`: a developer's machine is not to get a server without being asked.
servers:
	@PATH="$$PATH:/usr/sbin:/usr/local/sbin"; export PATH; \
	if command -v sshd >/dev/null; then echo "sshd: $$(command -v sshd)"; \
	elif [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q >/dev/null && \
		DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends openssh-server >/dev/null && \
		echo "sshd: installed"; \
	else echo 'sshd is not installed, and cannot be without root and apt-get' >&2; exit 1; fi

venv: $(VENV)/.installed

# torch comes first and alone, so that nothing else can decide which build of it is fetched.
$(VENV)/.torch: constraints.txt
	@test -n '$(PYTHON)' || { echo 'make: no Python 3.11 or newer found; say make PYTHON=/path/to/python' >&2; exit 1; }
	@echo 'Making $(VENV) with $(PYTHON); the first time takes a few minutes'
	'$(PYTHON)' -m venv --clear '$(VENV)'
	$(PIP) -c constraints.txt 'torch==2.13.0'
	@touch '$@'

$(VENV)/.installed: $(VENV)/.torch setup.cfg pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e '.[test]'
	@touch '$@'

clean:
	rm -rf '$(VENV)' build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
