# setup | doctor | demo | onnx | litert | app | phone | test | test-slurm | test-kills | lint | bench | bench-train | clean | clean-scratch.
# The README gives the first three in plain commands too.

PYTHON ?= python3
BIN = .venv/bin
ifeq ($(OS),Windows_NT)
BIN = .venv/Scripts
endif

# The wheels of an offline bundle, where one was unpacked, take the place of the index.
ifneq ($(wildcard resources/offline/wheels),)
export PIP_NO_INDEX = 1
export PIP_FIND_LINKS = resources/offline/wheels
endif

# Built without what this project does not use, and as a unity build: a minute and a half on two
# cores instead of eight. Where that fails, the plain build follows.
QUICK_BUILD = -DLLAVA_BUILD=OFF -DCMAKE_UNITY_BUILD=ON \
	-DCMAKE_PROJECT_llama.cpp_INCLUDE='$(CURDIR)/envs/llama_cpp.cmake'
LLAMA = $(shell sed -n 's/^\(llama-cpp-python==[^ ]*\).*/\1/p' requirements.txt)
# With flags of your own pip must not take a llama-cpp-python from its cache that was built without them.
BUILD = $(BIN)/python -m pip wheel --quiet --no-deps $(if $(CMAKE_ARGS),--no-cache-dir) \
	--wheel-dir .venv/wheels '$(LLAMA)'
# Most modules are never imported, so they are compiled when they first are, where Python may write that down.
INSTALL = $(BIN)/python -m pip install --quiet $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile) \
	--constraint constraints.txt

.PHONY: setup doctor demo onnx litert app phone test test-slurm test-kills lint bench bench-train clean clean-scratch

setup: .venv/installed

.venv/installed: requirements.txt constraints.txt envs/llama_cpp.cmake
	$(PYTHON) -c 'import sys; sys.exit("error: Python %d.%d is too old: 3.11 or newer is needed (make PYTHON=python3.12 setup)" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(MAKE) --jobs=2 .venv/llama_cpp .venv/packages
	$(INSTALL) .venv/wheels/*.whl
	$(BIN)/snakemake --cores 1 --quiet all --configfile runs/demo.yaml -- fetch_converter
	touch $@

# Side by side: one computes, the other waits for the network.
.PHONY: .venv/llama_cpp .venv/packages
.venv/llama_cpp:
	rm -rf .venv/wheels
	CMAKE_ARGS="$(CMAKE_ARGS) $(QUICK_BUILD)" $(BUILD) || $(BUILD)

.venv/packages:
	grep -v '^llama-cpp-python' requirements.txt > .venv/requirements.txt
	$(INSTALL) --requirement .venv/requirements.txt

# What a recipe of another format needs, beside .venv, which does not grow by it. Without the packages'
# own dependencies: the file names them all, and those that .venv has are not there twice.
onnx litert: %: .packages/%/installed

.packages/%/installed: requirements-%.txt .venv/installed
	rm -rf .packages/$*
	$(INSTALL) --no-deps --target .packages/$* --requirement $<
	touch $@

# Says what is missing before the hours are spent; needs no set-up, so that it can say that too.
# make doctor CONFIG=runs/mine.yaml PROFILE=profiles/slurm
doctor:
	@$(or $(wildcard $(BIN)/python),$(wildcard $(BIN)/python.exe),$(PYTHON)) scripts/check_machine.py \
		$(if $(CONFIG),--configfile $(CONFIG)) $(if $(PROFILE),--profile $(PROFILE))

demo: setup
	$(BIN)/snakemake --cores all --configfile runs/demo.yaml
	@echo "The report is in results/demo/report.html"

# The page that asks a run's file in a browser, served on the local network until Ctrl-C.
# make app CONFIG=runs/mine.yaml PORT=8080
APP_CONFIG = $(or $(CONFIG),runs/demo.yaml)
app: setup
	$(BIN)/snakemake --cores all --configfile $(APP_CONFIG) -- app
	$(BIN)/python scripts/serve_app.py --configfile $(APP_CONFIG) $(if $(PORT),--port $(PORT))

# On a phone that adb sees, or a board that ssh reaches; looks for it before anything is computed.
# make phone CONFIG=runs/mine.yaml BUNDLE=results/mine/bundle HOST=pi@raspberrypi
BUNDLE = results/bundle
RUN_ON_PHONE = $(BIN)/python scripts/run_on_phone.py $(if $(HOST),--host $(HOST)) $(if $(SERIAL),--serial $(SERIAL))
phone: setup
	$(RUN_ON_PHONE) --look
	$(BIN)/snakemake --cores all $(if $(CONFIG),--configfile $(CONFIG)) -- $(BUNDLE) build_phone
	$(RUN_ON_PHONE) --bundle $(BUNDLE) --output $(dir $(BUNDLE))phone.json

test: setup
	$(BIN)/python -m pytest

# Installs Debian's SLURM, as root, and starts its daemons on this machine; ends them afterwards.
test-slurm: setup
	tests/slurm/install.sh
	$(BIN)/python -m pytest tests/slurm

# About ninety kills, more than half an hour, and more where the packages of other formats are here; `make test`
# does a few.
test-kills: setup
	$(BIN)/python tests/kill_every_rule.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/snakefmt --check Snakefile sweep.smk rules
	$(BIN)/mypy
	$(BIN)/snakemake --lint --configfile runs/demo.yaml

bench: setup
	$(BIN)/python benchmarks/true_scale.py

bench-train: setup
	$(BIN)/python -m pip install --quiet --requirement benchmarks/requirements.txt --constraint constraints.txt
	$(BIN)/python benchmarks/training.py

# Checkpoints of trainings that were interrupted and are not wanted any more.
clean-scratch:
	rm -rf results/scratch results/*/scratch

clean:
	rm -rf results/demo resources/demo
