# lipprep's commands for a clone of the repository: `make help` lists them.
#
# Every target sets itself up: .venv is made on the first call and again when pyproject.toml or
# constraints.txt change. Once the packages are there, everything works offline.

PYTHON ?= python3
VIDEOS ?= data/lipread_mp4
MANIFEST ?= manifests/lrw.jsonl
# Options handed on to lipprep, pytest or the benchmark: make landmarks ARGS="--detector fan -j 8"
ARGS ?=
# PyPI's torch for Linux carries CUDA, some gigabytes of it. Another build, such as the one for CPUs alone
# or for another CUDA, comes from the index that PyTorch's "Get started" page names for it:
#     make setup TORCH_INDEX=URL
# It counts when .venv is made; remove .venv to change the build.
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
LIPPREP := $(BIN)/lipprep
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETUP := $(VENV)/.lipprep-setup
DEMO := build/demo

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# lipprep uses all cores itself.
.NOTPARALLEL:
# Folders called shards and train stand beside this file: make must not take them for what it is to make.
.PHONY: help setup test test-browser test-cluster test-real chaos lint format demo landmarks crops shards bench bench-scale bench-train bench-landmarks bench-predict bench-grid bench-faults bench-report models-table clean have-videos have-grid

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(SETUP)  ## make .venv with everything in it (PYTHON=python3.12, TORCH_INDEX=URL)
	@echo "$(VENV) is ready. To call lipprep by its name: . $(BIN)/activate"

# torch comes first and alone, so that pip takes whichever build of the tested version it finds, and what
# follows finds it there. torch brings setuptools, which builds lipprep without asking a network for it.
# pip compiles what it installs, but not what it leaves where it is; and where Python is told to write no bytecode,
# as in many containers, each process would compile it anew.
$(SETUP): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v[:2] < (3, 14) else \
	"lipprep needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is Python %d.%d. Name another: make setup PYTHON=python3.12" % v[:2])' && \
	  echo "Making $(VENV)" && $(PYTHON) -m venv --clear $(VENV); }
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch setuptools
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	$(BIN)/python -m compileall -q lipprep pipeline stages train
	@$(BIN)/python -c 'import cv2' 2>/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "OpenCV cannot be loaded, usually for want of libGL: installing libgl1 and libglib2.0-0" && \
	    apt-get -q update && apt-get -q install -y --no-install-recommends libgl1 libglib2.0-0; \
	  else \
	    echo "OpenCV cannot be loaded, usually for want of libGL. On Debian: sudo apt-get install libgl1 libglib2.0-0" >&2; \
	    echo "Then say make setup again." >&2; \
	    exit 1; \
	  fi; }
	@$(BIN)/python -c 'import cv2' 2>/dev/null || { \
	  echo "OpenCV cannot be loaded; this says why: $(BIN)/python -c 'import cv2'" >&2; \
	  exit 1; }
	@touch $@

test: $(SETUP)  ## run the tests, on two cores (ARGS=-n0: on one, with what they print)
	@mkdir -p build
	@HYPOTHESIS_STORAGE_DIRECTORY=build/hypothesis $(BIN)/python -m pytest -q --basetemp=build/tests -m "not browser and not cluster" \
	  -n 2 --dist worksteal $(ARGS)

# playwright drives the Chromium that is installed: one of its own it would have to download.
test-browser: $(SETUP)  ## run the tests in a real browser, Chromium
	@test -n "$$PLAYWRIGHT_CHROMIUM" || { \
	  command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "There is no Chromium: installing Debian's" && \
	    apt-get -q update && apt-get -q install -y --no-install-recommends chromium; \
	  else \
	    echo "There is no Chromium. On Debian: sudo apt-get install chromium" >&2; \
	    echo "Or name one: make test-browser PLAYWRIGHT_CHROMIUM=/path/to/chromium" >&2; \
	    exit 1; \
	  fi; }
	$(PIP) install -q -c constraints.txt playwright
	@mkdir -p build
	@HYPOTHESIS_STORAGE_DIRECTORY=build/hypothesis $(BIN)/python -m pytest -q --basetemp=build/tests-browser -m browser $(ARGS)

test-cluster: $(SETUP)  ## run the tests that start clusters, Ray's among them, and all slower ones
	$(PIP) install -q -c constraints.txt ray
	@mkdir -p build
	@HYPOTHESIS_STORAGE_DIRECTORY=build/hypothesis $(BIN)/python -m pytest -q --basetemp=build/tests -m "cluster or dask" $(ARGS)

test-real: have-grid $(SETUP)  ## run the tests that need real videos (LIPPREP_GRID=/path/to/grid)
	@mkdir -p build
	@HYPOTHESIS_STORAGE_DIRECTORY=build/hypothesis $(BIN)/python -m pytest -q --basetemp=build/tests -m real $(ARGS)

chaos: $(SETUP)  ## break the pipeline on purpose 100 times and compare its bytes (LIPPREP_GRID: real videos too)
	$(BIN)/python tests/chaos.py $(ARGS)

lint: $(SETUP)  ## check the code's style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(SETUP)  ## put the code into that style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

demo: $(SETUP)  ## the whole chain on a small corpus that it makes itself, all of it in build/demo
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	$(LIPPREP) sample $(DEMO)/videos
	$(LIPPREP) manifest lrw $(DEMO)/videos -o $(DEMO)/manifests/demo.jsonl
	$(LIPPREP) landmarks -m $(DEMO)/manifests/demo.jsonl -w $(DEMO)/work
	$(LIPPREP) crops -m $(DEMO)/manifests/demo.jsonl -w $(DEMO)/work
	$(LIPPREP) shards -m $(DEMO)/manifests/demo.jsonl -w $(DEMO)/work -o $(DEMO)/shards
	$(LIPPREP) report -m $(DEMO)/manifests/demo.jsonl -w $(DEMO)/work --shards $(DEMO)/shards -o $(DEMO)/report.html
	$(LIPPREP) train --shards $(DEMO)/shards --recipe compact --run $(DEMO)/run
	$(LIPPREP) evaluate $(DEMO)/run --shards $(DEMO)/shards --split test >$(DEMO)/evaluation.txt
	@cat $(DEMO)/evaluation.txt
	set -- $(DEMO)/videos/*/test/*.mp4; $(LIPPREP) predict "$$1" --checkpoint $(DEMO)/run
	@echo
	@echo "videos      $(DEMO)/videos"
	@echo "manifest    $(DEMO)/manifests/demo.jsonl"
	@echo "work        $(DEMO)/work/demo"
	@echo "shards      $(DEMO)/shards"
	@echo "report      $(DEMO)/report.html"
	@echo "run         $(DEMO)/run"
	@echo "evaluation  $(DEMO)/evaluation.txt"
	@sed -n '/[Tt]op-1/p' $(DEMO)/evaluation.txt

landmarks: $(MANIFEST)  ## find the face landmarks of MANIFEST's clips, listing VIDEOS in it first where it is missing
	$(LIPPREP) landmarks -m $(MANIFEST) $(ARGS)

crops: $(SETUP)  ## cut the mouth crops of MANIFEST's clips
	$(LIPPREP) crops -m $(MANIFEST) $(ARGS)

shards: $(SETUP)  ## pack the mouth crops into shards/
	$(LIPPREP) shards -m $(MANIFEST) $(ARGS)

bench: $(SETUP)  ## time every stage and print each figure beside its limit
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-scale: $(SETUP)  ## a million rows, a hundred thousand clips, two workers, Dask beside loky (half an hour)
	for part in rows clips workers engines; do $(BIN)/python benchmarks/scale.py $$part || exit 1; done

bench-train: $(SETUP)  ## loading, training and evaluation against what people do today (40 minutes)
	$(BIN)/python benchmarks/training.py $(ARGS)

bench-landmarks: $(SETUP)  ## cheaper ways to the landmarks, and what they cost (LIPPREP_GRID: on real videos too)
	$(BIN)/python benchmarks/landmarks.py $(ARGS)

bench-predict: $(SETUP)  ## time lipprep predict on ten seconds of 720p, beside real time (a minute)
	$(BIN)/python benchmarks/predict.py $(ARGS)

bench-grid: have-grid $(SETUP)  ## the chain and its accuracy on real videos (LIPPREP_GRID=/path/to/grid, 50 minutes; ARGS=augment, plateau or models)
	$(BIN)/python benchmarks/grid.py $(ARGS)

bench-faults: have-grid $(SETUP)  ## plant 100 faults in 1,000 clips, and see which the report suspects (LIPPREP_GRID, 6 minutes; ARGS=sample)
	$(BIN)/python benchmarks/faults.py $(ARGS)

bench-report: $(SETUP)  ## write a report on ten thousand clips, and open its page in Chromium
	$(BIN)/python benchmarks/report.py $(ARGS)

models-table: $(SETUP)  ## write the tables of docs/models.md anew, and time every network for them (minutes)
	$(BIN)/python benchmarks/models.py $(ARGS)

clean:  ## remove build/ and the caches, nothing that took you hours
	rm -rf build dist lipprep.egg-info .pytest_cache .ruff_cache .hypothesis

# All order-only: a manifest that stands is never made again, whatever is newer.
$(MANIFEST): | have-videos $(SETUP)
	$(LIPPREP) manifest lrw "$(VIDEOS)" -o "$@"

# Asked before the set-up, so that the answer takes no minutes.
have-videos:
	@test -e "$(MANIFEST)" || test -d "$(VIDEOS)" || { \
	  echo "There is no manifest $(MANIFEST), and no folder $(VIDEOS) to make it from: LRW's lipread_mp4 is looked for there," >&2; \
	  echo "with videos like ABOUT/test/ABOUT_00001.mp4. Name another place: make landmarks VIDEOS=/path/to/lipread_mp4" >&2; \
	  exit 1; }
ifeq ($(origin VIDEOS),command line)
	@test ! -e "$(MANIFEST)" || \
	  echo "$(MANIFEST) stands and is used as it is. For other videos name another: make landmarks VIDEOS=... MANIFEST=manifests/NAME.jsonl"
endif

have-grid:
	@test -d "$$LIPPREP_GRID" || { \
	  echo "This needs videos of the GRID corpus: set LIPPREP_GRID to a folder" >&2; \
	  echo "with video/SPEAKER/CODE.mpg and align/SPEAKER/CODE.align in it." >&2; \
	  exit 1; }
