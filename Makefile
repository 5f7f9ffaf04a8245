# make demo   set-up, then the main job: images to a table of accuracies
# make test   set-up, then the whole test suite, in two processes
# make soak   the tests that make test leaves out for their time
# make check  ruff and mypy
# make bench  rates of every stage, beside its peers and its limit (some 25 minutes)
# make wheel  dist/: the source distribution, and a wheel from it for any Linux (libjpeg inside)
.NOTPARALLEL:

DATASET ?= digits
PYTHON := .venv/bin/python

.PHONY: demo test soak check bench wheel

demo:
	./setup.sh
	$(PYTHON) -m fastproj.demo --dataset $(DATASET)

test:
	./setup.sh dali dev
	$(PYTHON) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

soak:
	./setup.sh dali dev
	$(PYTHON) -m pytest -m soak

check:
	./setup.sh dali dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

bench:
	./setup.sh dali dev
	$(PYTHON) -m fastproj.bench all $(BENCH)

wheel:
	./setup.sh dev
	rm -rf build dist
	$(PYTHON) -m build --outdir build/dist
	PATH="$(CURDIR)/.venv/bin:$$PATH" auditwheel repair --wheel-dir dist build/dist/*.whl
	mv build/dist/*.tar.gz dist
