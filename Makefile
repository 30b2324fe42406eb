# `make demo` and `make test` need Python 3.11-3.13 and make, nothing else.
.PHONY: demo test lint install
BIN := .venv/bin
ARGS ?=

demo: install
	$(BIN)/python -m pipeline.run --preset demo $(ARGS)

test: lint
	$(BIN)/python -m pytest --numprocesses 2 $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: .venv/.installed

.venv/.installed: pyproject.toml scripts/install.sh
	sh scripts/install.sh
	touch $@
