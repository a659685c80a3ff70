# Every target does its own set-up: a local virtual environment, pinned packages, the native build.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
BUILT  := $(VENV)/.built
KERNELS := $(VENV)/.kernels
VLLM_VENV  ?= .venv-vllm
VLLM_BIN   := $(VLLM_VENV)/bin
VLLM_READY := $(VLLM_VENV)/.ready
DOCS_VENV  ?= .venv-docs
DOCS_READY := $(DOCS_VENV)/.ready
GPU_VENV   ?= .venv-gpu
GPU_PYTHON ?= python3.12
GPU_READY  := $(GPU_VENV)/.ready
SOURCES := setup.py CMakeLists.txt pyproject.toml $(wildcard csrc/* csrc/*/*)
TEST_ARGS ?=
GPU_CHECK_ARGS ?=
WHEEL_CHECK_ARGS ?=
# Triton's kernels on a CPU: the interpreter has to be chosen before Triton is imported.
INTERPRETED_TESTS = TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops -k cpu-triton
EMULATOR_TESTS    = $(BIN)/python -m pytest tests/emulator
SIDE_LOG          = build/side-tests.log
METHODS ?= none fastv:2:0.5 fastv:2:0.22 pyramiddrop:2=0.5,4=0.25,6=0.125 schedule:4=0.22 \
	random:0.5 random:0.22

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench bench-compare bench-model bench-vllm gpu-check \
	gpu-rehearsal triton-cache evaluate leaderboard wheel wheel-check vllm-check clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

$(READY): constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement constraints.txt
	touch $@

# For this machine alone: no CUDA kernels where there is no GPU to run them.
$(BUILT): $(READY) $(SOURCES)
	VTP_BUILD=$${VTP_BUILD:-here} \
		$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# For all GPUs: what the tests look into.
$(KERNELS): $(READY) $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(BUILT) $@

# Without its native part, which is in the tree: that of $(BUILT) is for any torch.
$(VLLM_READY): tests/vllm_check/requirements.txt tests/vllm_check/make_importable.py pyproject.toml
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --requirement tests/vllm_check/requirements.txt
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM_BIN)/python tests/vllm_check/make_importable.py
	VTP_BUILD=none $(VLLM_BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Pages are made from docstrings that are read, not imported: no torch here.
$(DOCS_READY): docs/requirements.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --no-compile --requirement docs/requirements.txt
	touch $@

# What a machine with a GPU may be expected to have, and no more. The library is that of the tree.
$(GPU_READY): tests/gpu/requirements.txt
	@test -x $(GPU_VENV)/bin/python || $(GPU_PYTHON) --version >/dev/null 2>&1 || \
		{ echo "GPU_PYTHON: expected a Python 3.12, got $(GPU_PYTHON), which does not run;" \
		"name one: make $(MAKECMDGOALS) GPU_PYTHON=/path/to/python3.12" >&2; exit 1; }
	test -x $(GPU_VENV)/bin/python || $(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --requirement tests/gpu/requirements.txt
	touch $@

demo: $(BUILT) ## a trained small LLaVA answers about a picture, dense and pruned
	$(BIN)/python -m vtp_kernels demo

test: lint docs $(KERNELS) ## lint, then every test this machine can run
	$(if $(TEST_ARGS),$(BIN)/python -m pytest $(TEST_ARGS),$(ALL_TESTS))

# Side by side, each on one core: what the second one said is shown at the end.
define ALL_TESTS
@mkdir -p build; \
echo "Triton's kernels are interpreted, and the emulator is tested, meanwhile: $(SIDE_LOG)"; \
{ $(INTERPRETED_TESTS); one=$$?; $(EMULATOR_TESTS) && exit $$one; } > $(SIDE_LOG) 2>&1 & side=$$!; \
trap "kill $$side" INT TERM; \
$(BIN)/python -m pytest --ignore=tests/emulator; status=$$?; \
wait $$side || status=$$?; \
cat $(SIDE_LOG); \
exit $$status
endef

lint: $(READY) ## style and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(DOCS_READY) ## the documentation as pages, in build/docs; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict

bench: $(BUILT) ## every op beside what would be used instead
	$(BIN)/python -m benchmarks --compile --json out/bench.json --plot out/bench.png

bench-compare: bench ## the same, beside the committed results of this kind of machine
	$(BIN)/python -m benchmarks.compare out/bench.json

bench-model: $(BUILT) ## the small LLaVA end to end, dense and pruned
	$(BIN)/python -m benchmarks.end_to_end --json out/end_to_end.json

gpu-check: ## what a GPU is needed for, with PYTHON as it is: nothing is installed
	$(PYTHON) -m benchmarks.gpu_check $(GPU_CHECK_ARGS)

gpu-rehearsal: $(KERNELS) $(GPU_READY) ## the same plan without a GPU, in the versions of such a machine
	$(GPU_VENV)/bin/python -m benchmarks.gpu_check --rehearse --budget 240 --out out/gpu-rehearsal

triton-cache: $(BUILT) $(GPU_READY) ## Triton's kernels compiled for sm_90, to be carried there
	$(GPU_VENV)/bin/python -m benchmarks.gpu_check.triton_cache

evaluate: $(BUILT) ## exact match of the small LLaVA, dense and pruned, on 2,000 held-out questions
	$(BIN)/python benchmarks/pocket_llava/evaluate.py --questions 2000 --method $(METHODS) \
		--json out/accuracy.json

leaderboard: $(BUILT) ## every method on the small LLaVA, at as many visual tokens
	$(BIN)/python benchmarks/pocket_llava/leaderboard.py --json out/leaderboard.json \
		--plot out/leaderboard.png

wheel: $(READY) ## a wheel for the architectures in VTP_CUDA_ARCHS, in dist/
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

wheel-check: $(READY) ## such a wheel, looked into and run in new environments with several torch
	$(BIN)/python tests/build/wheel_check.py $(WHEEL_CHECK_ARGS)

vllm-check: $(BUILT) $(VLLM_READY) ## the vLLM plugin in vLLM's CPU build, offline and behind its server
	$(VLLM_BIN)/python -m pytest --confcutdir=tests/vllm_check tests/vllm_check \
		--ignore=tests/vllm_check/stages $(TEST_ARGS)
	$(VLLM_BIN)/python -m pytest --confcutdir=tests/vllm_check tests/vllm_check/stages $(TEST_ARGS)

bench-vllm: $(BUILT) $(VLLM_READY) ## the small LLaVA in vLLM, dense and pruned in several ways
	$(VLLM_BIN)/python -m benchmarks.serving --json out/vllm.json
	$(VLLM_BIN)/python -m benchmarks.staged_serving --json out/vllm_stages.json

clean: ## everything that was built, the virtual environment too
	rm -rf $(VENV) $(VLLM_VENV) $(GPU_VENV) $(DOCS_VENV) build dist out vtp_kernels/*.so *.egg-info
