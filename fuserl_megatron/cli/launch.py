"""`fuserl launch`: a chain of stages."""

import argparse

from fuserl_megatron.cli.options import OVERRIDES, Jobs, add_command, add_config_options


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "launch",
        run,
        "a chain of stages, on SLURM or on this machine",
        f"""examples:
  fuserl launch target=models/target stages=[build_sft,build_po,fusesft,fusepo] run.results_dir=runs/small \\
      build_sft.inputs=[a.jsonl] build_po.inputs=[b.jsonl] build_sft.reward_temperature=0.01 \\
      build_po.reward_temperature=0.01 fusesft.recipe=small_fusesft fusepo.recipe=small_fusepo_ln_dpo
  fuserl launch target=models/target stages=[sample,score,build_sft,fusesft] sample.prompts=[prompts.jsonl] \\
      sample.sources=[llama31_70b,qwen25_72b] sample.n=4 score.rewards=[length] build_sft.reward_temperature=0.01 \\
      fusesft.recipe=small_fusesft run.results_dir=runs/small
  fuserl launch --dry-run cluster=slurm cluster.partition=gpu cluster.gpus_per_node=8 target=models/target \\
      stages=[fusesft,evaluate] fusesft.data.path=fused evaluate.data.path=heldout fusesft.cluster.nodes=4 \\
      fusesft.recipe=llama31_8b_fusesft run.results_dir=runs/large

Stages, in this order: sample, logprobs, score, import, build_sft, build_po, build_heldout, fusesft, reference, fusepo,
export, evaluate. Each reads what the ones before it write (build_sft and build_po both read all that score writes).
STAGE.KEY=value is KEY of `fuserl sample`, `logprobs`, `score`, `build` or `train`, train.KEY one for all that train,
STAGE.cluster.KEY a resource of one stage. On this machine (cluster=local) a stage takes TP x PP x CP ranks unless
cluster.ntasks_per_node says otherwise; evaluate compares with target (evaluate.before=DIR, or null). The same command
again goes on where the chain stopped.
{OVERRIDES}""",
    )
    command.add_argument("--dry-run", action="store_true", help="print settings, scripts and commands, stop")
    add_config_options(command, "config")


def run(options: argparse.Namespace) -> int:
    """`fuserl launch`."""
    from fuserl_megatron.launch.chain import launch, unfinished
    from fuserl_megatron.launch.pipeline import load_pipeline

    pipeline = load_pipeline(options.overrides, options.config_dir, options.config_name)
    if any(stage.config for stage in pipeline.stages):
        from fuserl_megatron.records.belonging import check_chain
        from fuserl_megatron.records.chain_files import check_there

        check_there(pipeline.stages, unfinished(pipeline))
        check_chain(pipeline.stages, pipeline.config.target)
    return launch(pipeline, options.overrides, options.dry_run)
