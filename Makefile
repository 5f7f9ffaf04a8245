# make demo   set-up, then the main job: images to a table of accuracies
# make test   set-up, then the whole test suite
# make check  ruff and mypy
# make bench  rates of every stage, beside its peers and its limit (some 20 minutes)
.NOTPARALLEL:

DATASET ?= digits
PYTHON := .venv/bin/python

.PHONY: demo test check bench

demo:
	./setup.sh
	$(PYTHON) -m fastproj.demo --dataset $(DATASET)

test:
	./setup.sh dali dev
	$(PYTHON) -m pytest

check:
	./setup.sh dali dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

bench:
	./setup.sh dali dev
	$(PYTHON) -m fastproj.bench all $(BENCH)
