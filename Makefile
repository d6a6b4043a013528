# Two commands for a machine with git, make and Python 3.11. They make one private virtual
# environment with a pinned nox and hand over to it; noxfile.py says what happens then.

PYTHON ?= python3
NOX := .venv/bin/nox

.PHONY: help crosscheck test

help:
	@echo "make crosscheck   run every backend that can run here, and say who agrees"
	@echo "make test         run the tests"
	@echo "$(NOX) --list   the sessions behind both, and more (after either command)"

crosscheck: $(NOX)
	$(NOX) --session crosscheck --error-on-missing-interpreters

test: $(NOX)
	$(NOX)

$(NOX): constraints/nox.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	    f"heedful needs Python 3.11 or later, and $(PYTHON) is {sys.version.split()[0]}. " \
	    "Name another one: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv --clear .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@
