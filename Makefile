# make demo         everything from archive to accuracy on synthetic faces: about two minutes
# make test         the tests, on the CPU
# make test-slow    the long tests: kills, full disks, memory over 100,000 images
# make fuzz         20,000 corrupt and hostile files of every format, new ones each time: 85 seconds
# make gpu          on a machine with a GPU: checks it against the CPU and times it, ten minutes
# make lint         ruff, style and formatting
# make demo-images  refresh images/demo, which the README shows, from the last make demo

PYTHON ?= python3
RUN := .venv/bin/python
INSTALLED := .venv/.installed

DEMO := --data-dir demo/data --runs-dir demo/runs --images-dir demo/images

.PHONY: demo test test-slow fuzz gpu lint demo-images

$(INSTALLED): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	@# opencv-python needs libGL, which servers often lack; the headless build is the same module.
	$(RUN) -c "import cv2" 2>/dev/null || { $(RUN) -m pip uninstall --quiet --yes opencv-python; \
		$(RUN) -m pip install --quiet opencv-python-headless; }
	touch $@

demo: $(INSTALLED)
	rm -rf demo
	$(RUN) -m tools.synthetic --output demo/data
	$(RUN) pre_process.py --data-dir demo/data --images-dir demo/images
	$(RUN) train.py $(DEMO) --network tiny --epochs 6 --batch-size 128 --margin-s 32 \
		--margin-m 0.3 --schedule linear --warmup-epochs 1 --clip-norm 5 --dropout 0 \
		--log-every 4
	$(RUN) lfw_eval.py $(DEMO) --robustness

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q --numprocesses 2 --dist loadfile

test-slow: $(INSTALLED)
	$(RUN) -m pytest -q -m slow

fuzz: $(INSTALLED)
	FUZZ_EXAMPLES=1000 $(RUN) -m pytest -q tests/fileio/test_fuzz.py

# Without $(INSTALLED): a machine with a GPU has its PyTorch, and perhaps no network.
gpu:
	$(PYTHON) -m bench.gpu

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

demo-images:
	@test -f demo/images/roc.png || { echo "run make demo first"; exit 2; }
	rm -rf images/demo
	mkdir -p images/demo
	cp demo/images/*.png demo/images/*.jpg images/demo/
	$(RUN) -m tools.augment_grid
