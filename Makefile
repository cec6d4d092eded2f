# The two commands of the README are `make demo` and `make test`; the rest is for development.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

# A process of tests for each core; threads that wait for work must not take the other one's core meanwhile.
BESIDE := OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile

.PHONY: demo test test-slow check format clean

demo: $(VENV)/demo.stamp
	$(BIN)/holotype demo

test: $(VENV)/dev.stamp
	$(BESIDE) -m "not slow"

test-slow: $(VENV)/dev.stamp
	$(BESIDE) -m "slow and not alone"
	$(BIN)/pytest -m "slow and alone"

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first and alone, so that pip resolves the large wheels once.
$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install -c constraints.txt torch torchvision
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) install -c constraints.txt -e ".[train,openvino]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) install -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
