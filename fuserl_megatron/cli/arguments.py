"""The command line of `fuserl`, every subcommand with its help and examples. `cli.py` runs it."""

import argparse

from fuserl_megatron import __version__
from fuserl_megatron.cli import commands
from fuserl_megatron.cli.score import add_score

OVERRIDES = """
Settings are hydra overrides, key=value: any key of fuserl_megatron/config/schema.py, and the groups of conf/
(objective=..., model=..., trainer=..., optim=..., recipe=...). A list is written key=[a,b]; text with spaces, commas
or equal signs goes in quotes: 'run.name="a, b"'.
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; every subcommand's namespace carries `run`, the function that does it."""
    parser = argparse.ArgumentParser(
        prog="fuserl",
        description="Fuse several strong language models into one smaller target: FuseRL on Megatron-core.",
        epilog="""examples:
  fuserl doctor
  fuserl build inputs=[scored.jsonl] output=fused tokenizer=models/target reward_temperature=0.01
  fuserl train --nproc 8 recipe=llama31_8b_fusesft model.path=models/target data.path=fused
  fuserl COMMAND --help

A mistake in the settings or files ends with one line; FUSERL_DEBUG=1 in the environment shows the traceback instead.
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fuserl {__version__}")
    jobs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    sample = _command(
        jobs,
        "sample",
        commands.sample,
        "prompts -> responses of several source models, each exactly once",
        f"""examples:
  fuserl sample prompts=[prompts.jsonl] output=samples sources=[my_model.yaml] n=4
  fuserl sample prompts=[prompts.jsonl] output=samples sources=[llama31_70b,qwen25_72b] n=5 --dry-run
  fuserl sample output=samples --status

A source is a file of conf/source/ or a yaml file of your own: where the model answers (url), or how its server is
started. sources.NAME.KEY=value changes a setting of one source. The same command goes on where it stopped, whatever
stopped it; a larger n or more prompts sample what is missing. docs/sampling.md begins at the beginning.
{OVERRIDES}""",
    )
    sample.add_argument(
        "--dry-run", action="store_true", help="check prompts and servers, print counts, time and price, stop"
    )
    sample.add_argument("--status", action="store_true", help="how far the run in output is, from its files, and stop")
    _add_config_options(sample, "sample")

    build = _command(
        jobs,
        "build",
        commands.build,
        "scored responses -> fused data set",
        f"""examples:
  fuserl build inputs=[scored.jsonl] output=fused tokenizer=models/target reward_temperature=0.01
  fuserl build inputs=[part-*.parquet] output=fused tokenizer=models/target reward_temperature=0.01 on_bad_record=skip
  fuserl build --config-dir my_conf --config-name my_build force=true
{OVERRIDES}""",
    )
    _add_config_options(build, "build")
    add_score(jobs, _command, _add_config_options)

    train = _command(
        jobs,
        "train",
        commands.train,
        "FuseSFT or FusePO, everything else from the configuration",
        f"""examples:
  fuserl train --nproc 2 trainer=cpu model=tiny model.path=models/target data.path=fused optim.lr=1e-4
  fuserl train --nproc 8 recipe=llama31_8b_fusesft model.path=models/target data.path=fused
  fuserl train --nproc 8 recipe=llama31_8b_fusepo_ln_dpo model.path=runs/llama31_8b_fusesft/hf data.path=fused_po
  fuserl train --dry-run recipe=llama31_8b_fusesft model.path=models/target data.path=fused --nproc 8
  torchrun --nnodes 2 --nproc-per-node 8 ... -m fuserl_megatron.cli train recipe=...
  srun --ntasks 16 fuserl train recipe=...

The same command on the same run.results_dir resumes from its newest checkpoint.
{OVERRIDES}""",
    )
    train.add_argument(
        "--dry-run", action="store_true", help="check, print the resolved settings and what follows, stop"
    )
    train.add_argument(
        "--reference-only", action="store_true", help="score what the loss reads of the reference model, stop"
    )
    _add_config_options(train, "train", ranks=True)

    nemo = _command(
        jobs,
        "nemo-config",
        commands.nemo_config,
        "a NeMo-Aligner SFT or DPO file -> settings of `fuserl train`",
        """examples:
  fuserl nemo-config gpt_dpo.yaml > mine.yaml
  fuserl train --config-name mine.yaml model.path=models/target data.path=fused_po data.validation_path=heldout

Prints a yaml file; comments above the settings say of every key of the NeMo file whether it is mapped, ignored (and
why) or unsupported. docs/nemo.md has the whole table.
""",
    )
    nemo.add_argument("file", metavar="FILE", help="NeMo-Aligner's yaml file, with or without its interpolations")

    launch = _command(
        jobs,
        "launch",
        commands.launch,
        "a chain of stages, on SLURM or on this machine",
        f"""examples:
  fuserl launch target=models/target stages=[build_sft,build_po,fusesft,fusepo] run.results_dir=runs/small \\
      build_sft.inputs=[a.jsonl] build_po.inputs=[b.jsonl] build_sft.reward_temperature=0.01 \\
      build_po.reward_temperature=0.01 fusesft.recipe=small_fusesft fusepo.recipe=small_fusepo_ln_dpo
  fuserl launch --dry-run cluster=slurm cluster.partition=gpu cluster.gpus_per_node=8 target=models/target \\
      stages=[fusesft,evaluate] fusesft.data.path=fused evaluate.data.path=heldout fusesft.cluster.nodes=4 \\
      fusesft.recipe=llama31_8b_fusesft run.results_dir=runs/large

Stages, in this order: import, build_sft, build_po, build_heldout, fusesft, reference, fusepo, export, evaluate. Each
reads what the ones before it write. STAGE.KEY=value is KEY of `fuserl build` or `fuserl train`, train.KEY one for all
that train, STAGE.cluster.KEY a resource of one stage. On this machine (cluster=local) a stage takes TP x PP x CP ranks
unless cluster.ntasks_per_node says otherwise; evaluate compares with target (evaluate.before=DIR, or null). The same
command again goes on where the chain stopped.
{OVERRIDES}""",
    )
    launch.add_argument("--dry-run", action="store_true", help="print settings, scripts and commands, stop")
    _add_config_options(launch, "config")

    evaluate = _command(
        jobs,
        "evaluate",
        commands.evaluate,
        "loss and preference metrics of a model on held-out prompts",
        f"""examples:
  fuserl evaluate model.path=runs/fusesft/hf data.path=heldout
  fuserl evaluate --before models/target model.path=runs/fusesft/hf data.path=heldout
  fuserl evaluate --nproc 8 recipe=llama31_8b_fusepo_ln_dpo model.path=runs/fusepo/hf data.path=heldout \\
      objective.reference=runs/fusesft/hf run.results_dir=runs/evaluation

Takes the settings of `fuserl train`. Prints the weighted NLL of each source's best response and, with a FusePO
objective, its loss and metrics; writes them to run.results_dir/evaluation.json. With --before, both models' figures.
{OVERRIDES}""",
    )
    evaluate.add_argument("--before", metavar="DIR", help="the model that training started from, to compare with")
    _add_config_options(evaluate, "train", ranks=True)

    parity = _command(
        jobs,
        "parity",
        commands.parity,
        "is this layout right? Its loss and gradients against one float64 process",
        f"""examples:
  fuserl parity --nproc 4 trainer=cpu trainer.precision=32 model.path=models/small data.path=fused \\
      model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=2
  fuserl parity recipe=llama31_8b_fusesft model.path=models/small data.path=fused trainer.precision=32 --threshold 1e-4
  torchrun --nproc-per-node 8 -m fuserl_megatron.cli parity recipe=...

Takes the settings of `fuserl train`, computes its first global batch twice, and prints the worst relative error of the
loss, the gradient norm and each group of parameters. Trains and writes nothing. Exit code 1 past the threshold.
{OVERRIDES}""",
    )
    parity.add_argument(
        "--threshold", type=float, metavar="X", help="largest relative error allowed (default: 1e-5; with bf16: 0.2)"
    )
    parity.add_argument("--steps", type=int, default=1, metavar="N", help="global batches to compare (default 1)")
    _add_config_options(parity, "train", ranks=True)

    convert = _command(
        jobs,
        "convert",
        None,
        "Hugging Face directory <-> Megatron checkpoint",
        """examples:
  fuserl convert hf-to-megatron models/target checkpoints/target
  fuserl convert megatron-to-hf runs/fuserl exported --dtype bfloat16
""",
    )
    directions = convert.add_subparsers(title="directions", metavar="DIRECTION", required=True)
    _add_conversions(directions)

    verify = _command(
        jobs,
        "verify",
        commands.verify,
        "are two models the same?",
        """examples:
  fuserl verify models/target checkpoints/target
  fuserl verify runs/fuserl exported --threshold 1e-4
  fuserl verify models/target exported --text my_prompts.txt --max-new-tokens 64 --json report.json

Compares config, tensors (exactly), per-token log-probabilities and greedy continuations, each model computed by its
own path in fp32 on the CPU: transformers for a Hugging Face directory, core for a Megatron checkpoint. Rounding grows
with depth: two ways to compute a model of 30 layers differ by some 3e-5; --threshold 1e-4 is right for real models.
Exit code 0 when everything agrees, 1 otherwise.
""",
    )
    for name in ("a", "b"):
        verify.add_argument(name, metavar=name.upper(), help="Hugging Face directory, Megatron checkpoint, or a run")
    verify.add_argument("--text", metavar="FILE", help="one text per line to score (default: built-in texts)")
    verify.add_argument("--threshold", type=float, default=1e-5, help="largest difference allowed, nats (default 1e-5)")
    verify.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="of the greedy continuations; 0: none (default 32)"
    )
    verify.add_argument("--hf", metavar="DIR", help="config and tokenizer, for a checkpoint that names none")
    verify.add_argument("--json", metavar="OUT", help="write the figures to this file")

    doctor = _command(
        jobs,
        "doctor",
        commands.doctor,
        "what is installed, what that gives, what to do about the rest",
        """examples:
  fuserl doctor
  fuserl doctor --json

Exit code 1 when training cannot work in this environment.
""",
    )
    doctor.add_argument("--json", action="store_true", help="machine-readable")

    demo = _command(
        jobs,
        "demo",
        commands.demo,
        "the skills experiment, end to end, on this machine",
        """examples:
  fuserl demo
  fuserl demo --dir /tmp/demo
""",
    )
    demo.add_argument("--dir", default="demo", help="directory to write (default: demo)")
    return parser


def _command(jobs, name: str, run, summary: str, epilog: str) -> argparse.ArgumentParser:
    command = jobs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ("" if summary.endswith("?") else "."),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=run, subparser=command)
    return command


def _add_config_options(command: argparse.ArgumentParser, root: str, ranks: bool = False) -> None:
    if ranks:
        default = "(default: TP x PP x CP)"
        command.add_argument("--nproc", type=int, metavar="N", help=f"ranks to start on this machine {default}")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, see below")
    command.add_argument(
        "--config-name", metavar="X", help=f"root file, without .yaml, or a yaml file's path (default {root})"
    )
    command.add_argument(
        "--config-dir", metavar="D", help="your own directory of yaml files, searched before the shipped ones"
    )


def _add_conversions(directions) -> None:
    to_megatron = _command(
        directions,
        "hf-to-megatron",
        commands.hf_to_megatron,
        "Hugging Face directory -> Megatron checkpoint of iteration 0, for any layout",
        """example:
  fuserl convert hf-to-megatron models/target checkpoints/target

Training starts from a Hugging Face directory by itself; this is for other Megatron programs.
""",
    )
    to_hf = _command(
        directions,
        "megatron-to-hf",
        commands.megatron_to_hf,
        "Megatron checkpoint of any layout -> Hugging Face directory",
        """examples:
  fuserl convert megatron-to-hf runs/fuserl exported --dtype bfloat16
  fuserl convert megatron-to-hf checkpoints/other exported --hf models/target --max-shard-size 2GB
""",
    )
    for direction in (to_megatron, to_hf):
        direction.add_argument("source", metavar="SRC")
        direction.add_argument("destination", metavar="DST")
        direction.add_argument(
            "--dtype", choices=["float32", "bfloat16", "float16"], help="of the written weights (default: the source's)"
        )
        direction.add_argument("--force", action="store_true", help="replace an existing destination")
    to_megatron.add_argument(
        "--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="padding of the vocabulary (128)"
    )
    to_megatron.add_argument(
        "--allow-pickle", action="store_true", help="also read pytorch_model.bin, with torch's weights-only loader"
    )
    to_hf.add_argument(
        "--hf", metavar="DIR", help="config and tokenizer (default: what the checkpoint or its run's config names)"
    )
    to_hf.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one safetensors file (default 5GB)")
