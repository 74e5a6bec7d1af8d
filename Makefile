# make demo    a Gemma 4 model answers questions about a picture
# make test    the whole test suite
# make check   format, lint, types and the fast tests
# make soak    hours of load, mutated requests, kills and aborts; SOAK="aborts --scale 0.1" runs one, shortened
# make clean   remove what these made
#
# All set-up happens here, in .venv. PYTHON=python3.12 chooses another interpreter.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell \
	$(p) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) and print("$(p)")' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
# one thread of torch a worker: two workers share the machine
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

PICTURES := gemcut/demo/pictures
# show the command line, then run it
ASK := ask() { printf '\n$$ gemcut run %s "%s"\n' "$$1" "$$2"; $(BIN)/gemcut run $$1 "$$2"; }; ask

.DEFAULT_GOAL := help
.PHONY: help demo test check soak clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 7

demo: $(VENV)/.run
	@$(ASK) "$(PICTURES)/shapes.png" "Describe the image."
	@$(ASK) "$(PICTURES)/sign.png" "What does the sign say?"
	@$(ASK) "$(PICTURES)/first.png $(PICTURES)/second.png" "Which image has more shapes?"

test: $(VENV)/.dev
	@$(PYTEST)

check: $(VENV)/.dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(PYTEST) -m "not slow"

soak: $(VENV)/.dev
	@OMP_NUM_THREADS=1 PYTHONPATH=.:tests:tests/server $(BIN)/python -m soak $(SOAK)

# A stamp is written when its installation is complete, so that one that broke off is done again.
$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "gemcut needs Python 3.11, 3.12 or 3.13: install one, or say make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit("gemcut needs Python 3.11 to 3.13; $(PYTHON) is %d.%d." % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV) || { echo "There is no venv module. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.run: pyproject.toml | $(VENV)/.python
	@echo "Installing gemcut and what it needs into $(VENV); the first time takes minutes (torch is large)."
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.python
	@echo "Installing gemcut and what its tests need into $(VENV); the first time takes minutes (torch is large)."
	@$(PIP) -e '.[dev]'
	@touch $(VENV)/.run $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
