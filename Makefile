# Every target a person needs. The first line of each comment block marked `##` is what `make help` shows.

PYTHON := .venv/bin/python
UV := build/bootstrap/bin/uv
TRACKS := 7.2 10.0 11.1 network-12 network-13
CODE := src tests benchmarks packaging
# A lab is a dozen processes of Python, and each would compile all it imports anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-live check format lock releases image image-debian clean distclean

help: ## show this list
	@sed -n 's/^\([a-z%-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
	    awk -F'|' '{ printf "%-22s %s\n", $$1, $$2 }'

setup: ## install what is missing: Debian packages, uv, the locked virtual environment
	@packaging/bootstrap.sh

releases: setup ## build releases (QEMU 7.2, 10.0, 11.1; dnsmasq and haproxy) under build/releases
	@$(PYTHON) -m nahtlos.runtime.releases.build $(TRACKS:%=--track %) $(if $(REFRESH),--refresh)

image: setup ## build the probe guest's disk image under build/images
	@$(PYTHON) -m nahtlos.runtime.releases.build --image

image-debian: setup ## build a small Debian image with cloud-init under build/debian (REFRESH=1: of newer packages)
	@$(PYTHON) -m nahtlos.runtime.releases.build --debian $(if $(REFRESH),--refresh)

demo: releases image ## upgrade the hypervisor under six running servers (ARGS= for options)
	@$(PYTHON) -m nahtlos.lab.demo $(ARGS)

test: test-fast test-live ## run all tests, also those with real QEMU, packets and disks

test-fast: setup ## run the tests that need neither root nor QEMU
	@$(PYTHON) -m pytest -q -n auto --dist worksteal -m "not live" $(ARGS)

test-live: releases image ## run the tests with real QEMU, packets and disks (needs root)
	@$(PYTHON) -m pytest -q -n auto --maxprocesses 3 --dist loadfile -m live $(ARGS)

check: setup ## format, lint, types and import contracts
	@.venv/bin/ruff format --check $(CODE)
	@.venv/bin/ruff check $(CODE)
	@.venv/bin/basedpyright
	@.venv/bin/lint-imports

format: setup ## put the code into its form
	@.venv/bin/ruff format $(CODE)
	@.venv/bin/ruff check --fix $(CODE)

bench-network: setup ## count what handovers lose, measure the virtual network (LONG=1: 200 handovers; needs root)
	@$(PYTHON) -m benchmarks.network $(if $(LONG),--long) $(ARGS)

bench-%: releases image ## run a benchmark, e.g. bench-moves (LONG=1: the long form)
	@$(PYTHON) -m benchmarks.$(subst -,_,$*) $(if $(LONG),--long) $(ARGS)

lock: setup ## resolve the dependencies again into packaging/requirements.lock
	@UV_CACHE_DIR=build/downloads/uv $(UV) pip compile --quiet --universal --generate-hashes --no-header \
	    --python-version 3.11 --group dev pyproject.toml --upgrade -o packaging/requirements.lock

clean: ## end this checkout's labs, remove what was built; downloads stay
	@if [ -x $(PYTHON) ]; then $(PYTHON) packaging/end_labs.py; fi
	@if [ -d build ]; then find build -mindepth 1 -maxdepth 1 ! -name downloads ! -name bootstrap -exec rm -rf {} +; fi

distclean: clean ## also remove downloads and the virtual environment
	@rm -rf build .venv
