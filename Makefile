# `make help` lists the targets. PYTHON, CC, CFLAGS and SECONDS can be given: make run CC=clang
PYTHON ?= python3
CC ?= cc
CFLAGS ?= -O3 -ffp-contract=off -Wall -Wextra -Wpedantic
VENV = .venv
PY = $(VENV)/bin/python

FUZZ_CC ?= clang
SECONDS ?= 600
FUZZ_TARGETS = model tokenizer prompt cli

.PHONY: help demo test lint bench fuzz clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 8

.DEFAULT:
	@echo "there is no target or file $@; run: make help" >&2; exit 1

run: run.c  ## build run, the inference program
	@command -v $(firstword $(CC)) > /dev/null || { echo "there is no C compiler $(firstword $(CC)); install one" \
	  "(Debian: apt-get install gcc), or name yours: make $@ CC=clang" >&2; exit 1; }
	$(CC) -std=c11 $(CFLAGS) -o $@ run.c -lm -lpthread

# the stamps change when what they install changes
$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { echo "$(PYTHON) is no" \
	  "Python 3.11 or newer; install one, or name yours: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/tests-installed: $(VENV)/installed tests/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

demo: demo/tok512/meta.json run  ## from made-up stories to a model that tells its own, short ones, in demo/ (5 minutes)
	$(PY) train.py --data_dir=demo --out_dir=demo/out --init_from=auto --vocab_source=custom --vocab_size=512 \
	  --dim=64 --n_layers=5 --n_heads=8 --n_kv_heads=4 --multiple_of=4 --max_seq_len=256 --batch_size=8 \
	  --gradient_accumulation_steps=1 --learning_rate=8e-3 --beta2=0.99 --weight_decay=0.01 --warmup_iters=100 \
	  --max_iters=1400 --eval_interval=350 --eval_iters=20
	./run demo/out/model.bin -z demo/tok512.bin -t 0.5 -s 1
	./run demo/out/model.bin -z demo/tok512.bin -t 0.5 -s 2 -i "Once upon a time, there was a little fox"
	$(PY) train.py --data_dir=demo --out_dir=demo/out --init_from=resume --ppo --target_len=100 --max_gen_len=220 \
	  --init_kl_coef=0.02 --exact_end --others=0 --learning_rate=1e-3 --adam_eps=1e-5 --target_kl=0.01 --ppo_iters=16 \
	  --rollout_size=100 --eval_interval=16 --eval_samples=1
	./run demo/out/ppo_model.bin -z demo/tok512.bin -t 0.5 -s 1
	./run demo/out/ppo_model.bin -z demo/tok512.bin -t 0.5 -s 2 -i "Once upon a time, there was a little fox"

demo/TinyStories_all_data/data00.json: | $(VENV)/installed
	$(PY) tinystories.py synth --data_dir=demo

demo/tok512.model: demo/TinyStories_all_data/data00.json
	$(PY) tinystories.py train_vocab --vocab_size=512 --data_dir=demo

demo/tok512/meta.json: demo/tok512.model
	$(PY) tinystories.py pretokenize --vocab_size=512 --data_dir=demo

test: lint run  ## the whole test suite; needs no network but for installing packages
	$(PY) -m pytest -q -n auto --maxprocesses=8 --dist worksteal tests

lint: $(VENV)/tests-installed  ## ruff, the linter
	$(PY) -m ruff check --config .ci/ruff.toml .

bench: run $(VENV)/installed  ## run's speed as a table; MODELS, PEER and more: see tests/bench.py
	@$(PY) tests/bench.py

fuzz/%: tests/fuzz.c run.c
	@mkdir -p fuzz
	@echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' | \
	  $(FUZZ_CC) -fsanitize=fuzzer,address,undefined -xc - -o fuzz/probe 2> /dev/null || \
	  { echo "make fuzz needs clang with libFuzzer (Debian: apt-get install clang libclang-rt-dev); got FUZZ_CC=$(FUZZ_CC)"; exit 1; }
	$(FUZZ_CC) -std=c11 -g -O1 -DSMALL -DFUZZ=$* -fno-sanitize-recover=all -o $@ -I. tests/fuzz.c -lm -lpthread \
	  -fsanitize=fuzzer,address,undefined,float-cast-overflow,float-divide-by-zero

# what is found is kept in fuzz/found-TARGET, an input that fails in fuzz/TARGET-crash-*
fuzz: $(FUZZ_TARGETS:%=fuzz/%)  ## run.c under clang's libFuzzer, SECONDS (600) for each target
	@for target in $(FUZZ_TARGETS); do \
	  mkdir -p fuzz/found-$$target; \
	  (set -x; fuzz/$$target -max_total_time=$(SECONDS) -timeout=20 -print_final_stats=1 \
	    -artifact_prefix=fuzz/$$target- fuzz/found-$$target tests/corpus/$$target) || exit 1; \
	done

clean:  ## remove what make built (not your data, not your models)
	rm -rf run demo bench fuzz $(VENV)
