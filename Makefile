# Everything a clone needs, with nothing but python3 and pip. `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
KERNELS = .venv-kernels
TOOLS   = .venv-tools
VLLM    = .venv-vllm
PYTEST  = -m pytest -q -n auto --maxprocesses=8

# Of `make fuzz`.
COUNT ?= 3000
SEED  ?= 0

# One thread per process: the tests run in parallel, and threads fighting over cores are slower than none.
export OMP_NUM_THREADS ?= 1
# Tests and the demo use the embedded model, never the network.
test test-slow test-range test-kernels test-kills test-tools test-vllm test-gpu evidence-quick fuzz demo: export HF_HUB_OFFLINE = 1

.PHONY: help install demo test test-slow test-range test-kernels test-kills test-tools test-vllm test-gpu evidence-quick fuzz quality bench

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

install: $(VENV)/.installed  ## set up .venv with the package (editable) and the tested versions

demo: $(VENV)/.installed  ## the embedded model writes, its three sizes answer from one image; cache memory next to a transformer's
	@$(VENV)/bin/nemotron-h demo

test: $(VENV)/.installed  ## the tests (about 6 minutes on two cores)
	$(VENV)/bin/python $(PYTEST)

test-slow: $(VENV)/.installed  ## the slow tests: compilation, many processes, large files
	$(VENV)/bin/python $(PYTEST) -m slow

test-range: $(VENV)/.installed  ## generation, cache, files, remote code and Trainer on the oldest, pinned and newest transformers
	$(VENV)/bin/python tests/transformers_range.py $(VERSIONS)

test-kills: $(VENV)/.installed  ## every command that writes, killed at many moments, then started again (slow)
	KILL_POINTS=$${KILL_POINTS:-60} $(VENV)/bin/python -m pytest -q -s --timeout=3600 -m 'kills or not slow' tests/house/test_kills.py tests/model/test_saving.py

test-kernels: $(KERNELS)/.installed  ## our Triton kernels and the packages' on CPU tensors, against PyTorch (minutes, no GPU)
	PYTHONPATH=$(KERNELS) TRITON_INTERPRET=1 $(VENV)/bin/python $(PYTEST) --timeout=900 \
		tests/model/test_kernels.py tests/model/test_triton.py tests/model/test_decode_graph.py tests/model/test_triton_on_paper.py

test-tools: $(TOOLS)/.installed  ## bitsandbytes (QLoRA) and Model-Optimizer on a CPU; axolotl, verl and ms-swift
	PYTHONPATH=$(TOOLS) $(VENV)/bin/python $(PYTEST) tests/house/test_quantisers.py tests/integrations/test_trainers.py

test-vllm: $(VLLM)/.installed  ## budgets of a parent in vLLM's CPU build, cut while they are loaded, against ours (minutes)
	rm -rf $(VLLM)/parent
	$(VENV)/bin/python experiments/serving/vllm_budget.py write $(VLLM)/parent
	$(VLLM)/bin/python experiments/serving/vllm_budget.py check $(VLLM)/parent

test-gpu: $(VENV)/.installed  ## our Triton kernels compiled on a GPU, against PyTorch; then their speed; writes docs/results
	$(VENV)/bin/python tests/gpu_check.py --output docs/results/kernels_gpu.json

evidence-quick: $(VENV)/.installed  ## every training experiment at a hundredth of its size, to see that its commands live
	$(VENV)/bin/python experiments/quick.py

fuzz: $(VENV)/.installed  ## mutate everything that is read, count what comes of it; seeded, minutes (COUNT=3000 SEED=0)
	cd tests && ../$(VENV)/bin/python -W ignore -m fuzz --count $(COUNT) --seed $(SEED)

quality: $(VENV)/.installed  ## lint and formatting, checked but not changed
	$(VENV)/bin/ruff check src conversion tests examples experiments setup.py
	$(VENV)/bin/ruff format --check src conversion tests examples experiments setup.py

bench: $(VENV)/.installed  ## speed on this CPU next to transformers' own model; writes docs/results
	$(VENV)/bin/nemotron-h bench cpu --output docs/results/bench_cpu --overwrite

# A stamp is newer than what it was installed from, so a second `make` installs nothing.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# A folder next to .venv, which stays without the packages. FORCE: their setup insists on CUDA otherwise.
$(KERNELS)/.installed: $(VENV)/.installed
	rm -rf $(KERNELS)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --target $(KERNELS) \
		triton==3.9.0 einops==0.8.2 ninja packaging setuptools wheel
	PYTHONPATH=$(KERNELS) MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
		CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE \
		$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --target $(KERNELS) \
		--no-build-isolation --no-deps mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0
	@touch $@

# No dependencies: .venv has torch, numpy and the rest already.
$(TOOLS)/.installed: $(VENV)/.installed
	rm -rf $(TOOLS)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --target $(TOOLS) --no-deps \
		bitsandbytes==0.50.2 nvidia-modelopt==0.47.0 omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 pulp==3.3.2 \
		axolotl==0.19.0 addict==2.4.0 verl==0.9.1 ms-swift==4.6.0 json_repair==0.64.6 colorama==0.4.6 \
		modelscope==1.40.2 modelscope_hub==0.5.1 cryptography==50.0.2 cffi==2.1.1 pycparser==3.12
	@touch $@

# An environment that reads torch from .venv and has vLLM's own transformers; the wheel asks for CUDA's torch, so its list is filtered.
$(VLLM)/.installed: $(VENV)/.installed tests/vllm_environment.py
	rm -rf $(VLLM)
	$(VENV)/bin/python tests/vllm_environment.py $(VLLM) $(VENV)
	@touch $@
