# SPDX-License-Identifier: Apache-2.0
# Two of these are all a newcomer needs: `make demo` and `make test`. Each target sets up what it
# needs first (tools/bootstrap.py: virtual environment, torch, compilers), once.
PYTHON ?= python3
DEV := .venv/bin/python tools/dev.py

.PHONY: help demo test build wheel bench lint format clean
help:
	@echo "make demo    train a small model with learnable sinks, compare with eager attention"
	@echo "make test    everything: C++ tests, sanitizers, fuzzing, package audit, Python suite"
	@echo "make build   the library and the torch operators (python/sinkattn/lib)"
	@echo "make wheel   dist/*.whl"
	@echo "make bench   benchmark on this machine"
	@echo "make lint    check formatting and style;  make format  apply them"
	@echo "make clean   remove build/ and dist/ (keeps .venv)"

demo:
	@$(PYTHON) tools/bootstrap.py --groups build demo
	@$(DEV) demo

test:
	@$(PYTHON) tools/bootstrap.py --groups build test sass
	@$(DEV) test

build:
	@$(PYTHON) tools/bootstrap.py --groups build
	@$(DEV) build

wheel:
	@$(PYTHON) tools/bootstrap.py --groups build
	@$(DEV) wheel

bench:
	@$(PYTHON) tools/bootstrap.py --groups build
	@$(DEV) bench

lint:
	@$(PYTHON) tools/bootstrap.py --groups lint
	@$(DEV) lint

format:
	@$(PYTHON) tools/bootstrap.py --groups lint
	@$(DEV) format

clean:
	rm -rf build dist python/sinkattn/lib
