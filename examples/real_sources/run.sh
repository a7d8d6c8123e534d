#!/usr/bin/env bash
# One command: prompts -> two real models through vLLM -> rewards -> FuseSFT -> FusePO -> held-out answers -> a table.
# Stopped at any place, the same command goes on: what is there is not made again. README.md says what must be installed.
#   bash examples/real_sources/run.sh [KEY=VALUE ...]     # overrides of chain.yaml, such as fusesft.trainer.max_steps=4
set -euo pipefail

here=examples/real_sources
run=runs/real_sources # also stands in the yaml files
python=${PYTHON:-python}
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} # for the rule
# vLLM on a CPU: a small cache, no pinning of threads, nothing asked of the network
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

fuserl() { "$python" -m fuserl_megatron.cli "$@" --config-dir "$here"; }
command -v vllm > /dev/null || { echo "error: no vllm on PATH: tests/servers/install_vllm.sh DIRECTORY makes one" >&2; exit 2; }
[ -d "$here" ] || { echo "error: run this from the root of the checkout" >&2; exit 2; }
# a stage or a sampling that was told to stop ends with 0 and leaves REQUEUE: nothing after it may start
goes_on() { ! compgen -G "$run/*/REQUEUE" > /dev/null && ! compgen -G "$run/*/*/REQUEUE" > /dev/null || exit 0; }

[ -f "$run/smollm2/config.json" ] || "$python" examples/smollm2/get_model.py --out "$run/smollm2"
[ -f "$run/gemma/config.json" ] || "$python" "$here/get_gemma.py" --out "$run/gemma"
[ -f "$run/heldout.jsonl" ] || "$python" "$here/prompts.py" --out "$run"

fuserl launch --config-name chain "$@"
goes_on
best=$("$python" "$here/table.py" --best-source "$run/fused/score/records.jsonl")
for arm in "single build_sft.sources=[$best]" "uniform build_sft.reward_temperature=1000"; do
  fuserl launch --config-name chain "stages=[build_sft,fusesft]" "build_sft.inputs=[$run/fused/score]" \
    "run.results_dir=$run/${arm%% *}" "${arm#* }" "$@"
  goes_on
done

ask() { fuserl sample "prompts=[$run/heldout.jsonl]" "output=$run/heldout" "sources=[$1]" n=4 "${@:2}"; goes_on; }
ask gemma,smollm2
for model in before=smollm2 single=single/fusesft/hf uniform=uniform/fusesft/hf fusesft=fused/fusesft/hf fusepo=fused/fusepo/hf; do
  ask target "sources.target.name=${model%%=*}" "sources.target.model=$run/${model#*=}"
done
"$python" "$here/table.py" "$run/heldout"
