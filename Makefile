PYTHON := .venv/bin/python

.PHONY: setup fast test lint docs clean

setup:
	python3 -m venv .venv
	.venv/bin/pip install -q -e '.[dev,docs]'

fast:
	$(PYTHON) -m pytest

test: fast
	$(PYTHON) -m pytest -m slow

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath $(PYTHON)
	$(PYTHON) scripts/write_docs.py --check

docs:
	.venv/bin/mkdocs build --strict

clean:
	rm -rf build dist site .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
