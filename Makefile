PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help demo test install lint types tests notebooks docs map browser pretrain bench bench-gpu clean

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(INSTALLED)  ## adapt a pre-trained ViT to new digits with five methods, show table and picture
	$(BIN)/python tutorials/demo.py

test: lint types tests notebooks docs  ## all that CI checks

install: $(INSTALLED)  ## make .venv with all that development needs

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

lint: $(INSTALLED)  ## style, and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(INSTALLED)  ## type check
	$(BIN)/mypy

tests: $(INSTALLED)  ## tests and doctests; those of kernels once more, interpreted
	$(BIN)/python -m pytest -n 2 --dist worksteal
	TRITON_INTERPRET=1 LIGHTNING_PEFT_KERNELS=interpret $(BIN)/python -m pytest -n 2 --dist worksteal tests/kernels

notebooks: $(INSTALLED)  ## run every tutorial
	$(BIN)/python -m pytest -n 2 --dist loadfile --nbval-lax --nbval-cell-timeout=60 -p no:warnings tutorials/*.ipynb

docs: $(INSTALLED) browser  ## build the site, strictly; look at its pages in a browser
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python -m pytest docs/test_site.py

map: $(INSTALLED)  ## run every tutorial alone: times and pictures in tutorials/README.md
	$(BIN)/python docs/generate/notebooks.py

# the tests of the site need a Chromium; where Debian's packages can be installed, one is
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	&& apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium >/dev/null; } \
	|| echo "No Chromium here: the site is built, but not looked at."

pretrain: $(INSTALLED)  ## make the checkpoints of the tutorials again
	$(BIN)/python tutorials/pretrain_digits.py
	$(BIN)/python tutorials/pretrain_denoisers.py
	$(BIN)/python tutorials/pretrain_llama.py

bench: $(INSTALLED)  ## figures beside HF PEFT, in one run
	$(BIN)/python -m benchmarks

bench-gpu: $(INSTALLED)  ## kernels beside those of others, on one NVIDIA GPU: two parts of eight minutes
	$(BIN)/python -m benchmarks.kernels --part 1
	$(BIN)/python -m benchmarks.kernels --part 2

clean:  ## remove what was made, the environment included
	rm -rf .venv runs site .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
