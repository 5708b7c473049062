# make demo     train and test on a toy data set, installation included, in minutes
# make test     all other tests, with coverage, the linter and the type checker
# make soak     the slow tests
# make fuzz     random files for the readers of untrusted files, FUZZ_SECONDS (600) per reader and engine
# make gpu      the tests that need a GPU, and its speed, in less than ten minutes
# make bench    speeds relative to the original's method; BENCH=full for the large sizes

PYTHON ?= python3
PY = .venv/bin/python
FUZZ_SECONDS ?= 600

.PHONY: demo test soak fuzz gpu bench

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/run
	$(PY) train_img_model_xent.py -d toy_market1501 --height 96 --width 48 --pretrained none \
	    --train-batch 16 --lr 0.0006 --max-epoch 15 --stepsize 11 --workers 1 --save-dir log/demo --overwrite

test: .venv/dev
	$(PY) -m pytest -n 2 --dist loadfile -m 'not soak' --cov --cov-report=term --cov-fail-under=90
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	$(PY) -m mypy

soak: .venv/dev
	$(PY) -m pytest -m soak

fuzz: .venv/dev
	$(PY) -m pip install --quiet --disable-pip-version-check --only-binary atheris atheris 2>/dev/null || \
	    echo 'atheris cannot be installed here: fuzzing continues without it'
	$(PY) tests/fuzz/test_fuzz.py --seconds $(FUZZ_SECONDS)

gpu: .venv/dev
	$(PY) benchmarks/gpu.py

bench: .venv/dev
	$(PY) benchmarks/table.py $(if $(filter full,$(BENCH)),--full)
