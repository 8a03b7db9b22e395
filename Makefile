# Everything a contributor does. `make demo` and `make test` work on a fresh machine: they create .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
RESULTS := bench/results
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test lint format slow results pareto grown tuned vllm-check vllm-speed report tables-of-results docs tables gpu clean

# torch comes first and exactly, so that no other package pulls in another build of it
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/.ready  ## the embedded model, every drafter and baseline, greedy and sampled: the table in the README
	$(BIN)/specdec bench tiny --prompts embedded --temperature 0,1 --limit 24

test: lint  ## lint, types, import contracts, tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow"

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: .venv/.ready  ## the proofs that take minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow

COLD := none,prompt-lookup,token-recycling,aded,suffix,hybrid,lookahead,jacobi,draft-model
COMPILED := none,prompt-lookup,token-recycling,aded,suffix,hybrid,draft-model
HEADS := none,medusa,hidden-transfer,hidden-transfer-all=hidden-transfer,chimera,eagle3
WARM := token-recycling,aded,suffix,hybrid,lookahead
TWO := none,draft-model,rsd,bild,s2d,s2d-2=s2d,s2d-6=s2d,auto
PARETO := --limit 60 --set draft-model.length=8
results: .venv/.ready  ## the figures of README and docs/results.md, into bench/results (leave the machine alone meanwhile)
	for t in 0 1; do \
	  $(BIN)/specdec bench tiny --temperature $$t --drafters $(COLD) --out $(RESULTS)/cold-$$t || exit 1; \
	  $(BIN)/specdec bench tiny --temperature $$t --drafters $(WARM) --baselines hf-generate --warm \
	    --out $(RESULTS)/warm-$$t || exit 1; \
	  $(BIN)/specdec bench tiny --temperature $$t --drafters $(HEADS) --set hidden-transfer-all.anchors=8 \
	    --baselines hf-generate --out $(RESULTS)/heads-$$t || exit 1; \
	  $(BIN)/specdec bench tiny --temperature $$t --drafters $(TWO) --set s2d-2.thresholds=0,0,0 \
	    --set s2d-6.thresholds=1,1,0 --baselines hf-generate --out $(RESULTS)/two-models-$$t || exit 1; \
	done
	$(BIN)/specdec bench tiny --temperature 0,1 --compile inductor --drafters $(COMPILED) --baselines hf-generate \
	  --out $(RESULTS)/compiled
	$(MAKE) tables-of-results

pareto: .venv/.ready  ## speed against quality of the lossy methods, into bench/results (leave the machine alone meanwhile)
	$(BIN)/specdec pareto tiny $(PARETO) --curve rollback.threshold=0,1,2,3,5,8 --curve ead.tau=0,3,4,5,6,7 \
	  --curve judge.threshold=-1,0.5,0.742,0.9,1 --out $(RESULTS)/pareto-0
	$(BIN)/specdec pareto tiny $(PARETO) --temperature 1 --curve typical.epsilon=0.01,0.03,0.09,0.3,1 \
	  --set typical.delta=10000 --out $(RESULTS)/pareto-1
	$(BIN)/specdec pareto tiny-lexical-units --limit 60 --curve lexical-units.beta=0.5,0.7,0.8,0.92,0.98,1.01 \
	  --set lexical-units.mode=trusting --out $(RESULTS)/pareto-lexical-units
	$(BIN)/specdec pareto tiny-image --temperature 1 --set draft-model.branching=3,2,1,1 \
	  --curve lantern.factor=1,1.5,2,3,5,10 --out $(RESULTS)/pareto-image

GROWN := build/grown-300M
MEMBERS := members=suffix,token-recycling,draft-model
grown: .venv/.ready  ## lossless speed-ups at the cost of 300M parameters in bfloat16 (leave the machine alone meanwhile)
	$(BIN)/specdec grow tiny --to 300M --out $(GROWN)
	$(BIN)/specdec bench $(GROWN) --dtype bfloat16 --draft-model tiny-draft --limit 12 \
	  --drafters none,prompt-lookup,suffix,hybrid,hybrid-draft=hybrid,draft-model --set hybrid-draft.$(MEMBERS) \
	  --out $(RESULTS)/grown-300M
	$(BIN)/specdec verify $(GROWN) --dtype bfloat16 --draft-model tiny-draft --drafter hybrid --set hybrid.$(MEMBERS) \
	  --limit 4 --out $(RESULTS)/grown-300M/certificate

tuned: .venv/.ready  ## what the tuner predicts, and what is then measured (leave the machine alone meanwhile)
	$(BIN)/specdec tune tiny --limit 16 --drafters suffix,token-recycling,hybrid,prompt-lookup --out $(RESULTS)/tuned/tiny.json
	$(BIN)/specdec tune $(GROWN) --dtype bfloat16 --drafters suffix,hybrid --limit 12 \
	  --max-new-tokens 48 --out $(RESULTS)/tuned/grown-300M.json
	$(BIN)/specdec bench tiny --temperature 0,1 --drafters none,auto --baselines hf-generate --repeats 2 \
	  --out $(RESULTS)/auto

vllm-check: .venv/.ready  ## what we train, run by vLLM itself (its CPU build, in .venv-vllm)
	$(BIN)/python -m specdec.bench.vllm.environment .venv-vllm
	$(BIN)/python -m specdec.bench.vllm.check

vllm-speed: .venv/.ready  ## its drafters, ours inside it, and ours here, side by side (leave the machine alone meanwhile)
	$(BIN)/python -m specdec.bench.vllm.environment .venv-vllm
	for t in float32 bfloat16; do \
	  $(BIN)/python -m specdec.bench.vllm.proposers --dtype $$t --limit 18 --repeats 1 --out $(RESULTS)/vllm-$$t || exit 1; \
	  $(BIN)/python -m specdec.bench.vllm.proposers --dtype $$t --limit 18 --repeats 1 --compile \
	    --out $(RESULTS)/vllm-$$t-compiled || exit 1; \
	done

report: .venv/.ready  ## one page of everything in bench/results, into bench/results/report
	$(BIN)/specdec report $(RESULTS)

RESULTS_OF = $(patsubst %,$(RESULTS)/%/results.md,$(1))
tables-of-results: .venv/.ready  ## put what stands in bench/results into README and docs/results.md
	$(BIN)/python -m specdec.bench.readme README.md $(call RESULTS_OF,cold-0 cold-1)
	$(BIN)/python -m specdec.bench.readme docs/results.md \
	  $(call RESULTS_OF,warm-0 heads-0 two-models-0 warm-1 heads-1 two-models-1 compiled grown-300M auto)

docs: .venv/.ready  ## regenerate docs/families.md from its test
	SPECDEC_WRITE_DOCS=1 $(BIN)/pytest tests/test_families.py

tables: .venv/.ready  ## measure RANK_ACCEPTANCE of drafters/token_recycling/trees.py (needs the shared data)
	$(BIN)/python -m specdec.bench.rank_acceptance --data ../shared/data

# where nothing can be installed, a python that has torch, triton, transformers and the packages beside them will do
ANY_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
ALL := none,prompt-lookup,suffix,aded,token-recycling,hybrid,lookahead,jacobi,medusa,chimera,eagle3,hidden-transfer,draft-model,rsd
gpu:  ## this machine's GPU: its tests; the kernel beside sdpa and flex, steps of 7B as graphs; every drafter on tiny
	$(ANY_PYTHON) -m pytest -q -m gpu tests/test_tree_attention.py tests/test_graphs.py
	$(ANY_PYTHON) -m specdec.bench.gpu --out $(RESULTS)/gpu
	for t in 0 1; do $(ANY_PYTHON) -m specdec bench tiny --device cuda --compile auto --temperature $$t --limit 12 \
	  --drafters $(ALL) --out $(RESULTS)/gpu/tiny-$$t || exit 1; done

clean:
	rm -rf .venv .venv-vllm build dist *.egg-info
