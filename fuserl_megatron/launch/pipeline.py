"""From the launcher's configuration to a list of stages: what each runs, on how much, and what it waits for.

    sample -> logprobs -> score -> import -> build_sft, build_po, build_heldout -> fusesft -> reference -> fusepo
    -> export -> evaluate

Nothing is written or started here. Every stage that reads settings gets them frozen as yaml: composed as its own
command would, over defaults that make a stage read what the ones before it write.
"""

import dataclasses
import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fuserl_megatron.config.derived import replica_ranks
from fuserl_megatron.config.launch_sections import ClusterConfig, LaunchConfig
from fuserl_megatron.config.load import load_config, to_yaml
from fuserl_megatron.config.objective import reference_mode, uses_reference
from fuserl_megatron.config.schema import Config
from fuserl_megatron.config.validate import validate, validate_build
from fuserl_megatron.launch.making import Making, asking_stages, score_stage
from fuserl_megatron.launch.resources import resources
from fuserl_megatron.launch.sections import ORDER, READS, load_sections, override, value_of
from fuserl_megatron.launch.stages import Pipeline, Stage
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.hub import local_model
from fuserl_megatron.util.paths import did_you_mean, export_of_run
from fuserl_megatron.util.text import show


def load_pipeline(
    overrides: Sequence[str] = (), config_dir: str | Path | None = None, config_name: str | None = None
) -> Pipeline:
    """Compose conf/config.yaml, the user's own directory and the command line into a chain of stages.

    Args:
        overrides: hydra overrides of the launcher (`cluster.nodes=2`), or with a stage's name in front of its command
            (`fusesft.optim.lr=1e-6`, `sample.sources=[a,b]`, `build_sft.inputs=[a.jsonl]`, `fusesft.cluster.nodes=4`).
        config_dir: the user's own directory of yaml files, searched before the shipped tree.
        config_name: root file (without .yaml) in config_dir or the shipped tree, or the path of a yaml file.

    Raises:
        UserError: what the command of a stage would refuse, or stages that do not fit together.
    """
    config, sections = load_sections(overrides, config_dir, config_name)
    return _Chain(config, sections, config_dir).pipeline()


class _Chain:
    """The stages so far, with the settings that later ones read."""

    def __init__(self, config: LaunchConfig, sections: Mapping[str, dict[str, str]], config_dir: str | Path | None):
        self.config, self.sections, self.config_dir = config, sections, config_dir
        self.root = Path(config.run.results_dir)
        if len(set(config.stages)) != len(config.stages):
            raise UserError(f"stages={show(config.stages)}: a stage is named twice; name each once.")
        self.wanted, self.target = set(config.stages), config.target
        self.notes: list[str] = []
        self.stages: dict[str, Stage] = {}
        self.trained: dict[str, Config] = {}
        self.made: dict[str, Making] = {}
        if not self.wanted:
            raise UserError("stages=[]: nothing to run; stages=[fusesft,fusepo] would work.")
        self.is_hf = (Path(local_model(config.target, weights=False)) / "config.json").is_file()
        if not self.is_hf and "import" not in self.wanted:
            raise UserError(
                f"target={config.target}: holds no config.json, so it is no Hugging Face model directory"
                f"{export_of_run(config.target)}; a Megatron checkpoint needs the stage import before the others."
            )

    def pipeline(self) -> Pipeline:
        for name in ORDER:
            if name in self.wanted:
                try:
                    getattr(self, f"_{name.partition('_')[0]}")(name)
                except UserError as error:
                    raise UserError(f"{name}: {error}") from None
        return Pipeline(config=self.config, stages=tuple(self.stages.values()), notes=tuple(self.notes))

    def _sample(self, name: str) -> None:
        self._ask(name, {})

    def _logprobs(self, name: str) -> None:
        asked = {key: word for key, word in self.sections.get("sample", {}).items() if key.startswith("sources")}
        self.sections = {**self.sections, name: asked | self.sections.get(name, {})}
        self._ask(name, self._written("samples", "sample"))

    def _ask(self, name: str, defaults: dict[str, Any]) -> None:
        """On SLURM a job for each source, if the jobs are ours: nemo-run has no array jobs."""
        apart = self.config.cluster.type == "slurm" and self.config.launcher == "fuserl"
        words = self._words({"output": str(self.root / name)} | defaults, name)
        made = asking_stages(name, words.values(), self.config_dir, apart)
        for key in self.sections.get(name, {}):
            if ".cluster." in key and not any(key.startswith(f"sources.{one.source}.") for one in made.values()):
                why = "is no job of its own: on SLURM each of the sources has one, elsewhere they share a process"
                raise UserError(f"{key}: {why}")
        for stage, one in made.items():
            self._make(stage, one, name)

    def _score(self, name: str) -> None:
        there = self._written("samples", "sample") | self._written("logprobs", "logprobs")
        words = self._words({"output": str(self.root / name)} | there, name)
        self._make(name, score_stage(words.values(), self.config_dir), name)

    def _make(self, name: str, made: Making, kind: str) -> None:
        self.made[name] = made
        folder = str(self.root / "launch" / made.tree)
        self._add(name, ("fuserl", kind, "--config-dir", folder), made.config, made.config.output, made.files, kind)

    def _written(self, key: str, kind: str) -> dict[str, Any]:
        """What a later stage reads of those of this kind, as a default."""
        found = [path for name in self._of(kind) if name in self.made for path in self.made[name].writes]
        return {key: found} if found else {}

    def _of(self, kind: str) -> list[str]:
        """The stages so far that are this one, or a part of it for one source."""
        return [name for name in self.stages if name == kind or name.startswith(f"{kind}_")]

    def _import(self, name: str) -> None:
        if self.is_hf:
            self.notes.append(f"import: nothing to do, training opens {self.config.target} as it is")
            return
        if not Path(self.config.target).exists():
            near = did_you_mean(self.config.target) or "; give a model or a Megatron checkpoint."
            raise UserError(f"target={self.config.target}: no such directory{near}")
        self.target = str(self.root / name)
        self._add(name, ("fuserl", "convert", "megatron-to-hf", self.config.target, self.target, "--force"))

    def _build(self, name: str) -> None:
        defaults: dict[str, Any] = dict(output=str(self.root / name), tokenizer=self.target, force=True)
        if "score" in self.made and name != "build_heldout":  # what is trained on is not held out
            defaults["inputs"] = self.made["score"].writes
        words = self._words(defaults, name)
        if "output" in self.sections.get(name, {}) and "force" not in self.sections[name]:
            words.pop("force")  # a directory of the user's own is not replaced unasked
        config = load_config("build", list(words.values()), self.config_dir)
        validate_build(config)
        self._add(name, ("fuserl", "build"), config, config.output)

    def _fusesft(self, name: str) -> None:
        self._train(name, self._words(self._data("build_sft") | {"model.path": self.target}, "train", name))

    def _reference(self, name: str) -> None:
        if "fusepo" not in self.wanted:
            raise UserError("scores for the stage fusepo, which is not among the stages; leave it out.")
        config = self._compose("fusepo", self._words(self._po_defaults(), "train", "fusepo", name))
        if not uses_reference(config.objective) or reference_mode(config) != "cache":
            self.notes.append("reference: nothing to do, fusepo reads no stored reference")
            return
        self._add(name, ("fuserl", "train", "--reference-only"), config, config.run.results_dir)

    def _fusepo(self, name: str) -> None:
        self._train(name, self._words(self._po_defaults(), "train", name))

    def _export(self, name: str) -> None:
        last = self._last("there is no checkpoint to export")
        if last.adapter.kind == "lora":
            self.notes.append(f"export: nothing to do, {last.run.results_dir}/hf is written by the training itself")
            return
        if last.exp_manager.checkpoint_callback_params.monitor is not None:
            raise UserError(
                "takes the newest checkpoint, and exp_manager.checkpoint_callback_params.monitor chooses the best: "
                "leave export out of stages, training then writes the best to hf/ itself."
            )
        to, options = str(self.root / name), self.config.export
        dtype = ("--dtype", options.dtype) if options.dtype else ()
        words = ("--force", "--max-shard-size", options.max_shard_size, *dtype)
        self._add(name, ("fuserl", "convert", "megatron-to-hf", last.run.results_dir, to, *words))

    def _evaluate(self, name: str) -> None:
        settings = self._words({}, name)
        last = self._last("there is no trained model to evaluate") if self.trained else None
        model = str(self.root / "export") if "export" in self.stages else f"{last.run.results_dir}/hf" if last else None
        if command := settings.pop("command", None):
            program = shlex.split(value_of(command))
            self._add(name, tuple(word.replace("{model}", model or self.target) for word in program))
            return
        before = "fusepo" if "fusepo" in self.trained else "fusesft"
        words = self._words({}, "train", before) if last else self._words({}, "train")
        words = {key: word for key, word in words.items() if key.partition(".")[0] != "adapter"}  # it is merged
        held_out = self._data("build_heldout") or ({"data.path": last.data.validation_path} if last else {})
        defaults = {"run.results_dir": str(self.root / name), "model.path": model or self.target} | held_out
        compared = settings.pop("before", None)
        before_model = value_of(compared) if compared else self.target if last else None
        if last and uses_reference(last.objective):
            defaults["objective.reference"] = last.objective.reference or last.model.path
        words |= {key: override(key, value) for key, value in defaults.items() if value is not None} | settings
        config = self._compose(name, words)
        compare = ("--before", before_model) if before_model and before_model not in ("null", "None") else ()
        self._add(name, ("fuserl", "evaluate", *compare), config, config.run.results_dir)

    def _po_defaults(self) -> dict[str, Any]:
        sft = self.trained.get("fusesft")
        defaults = self._data("build_po") | {"model.path": f"{sft.run.results_dir}/hf" if sft else self.target}
        return defaults | {"run.results_dir": str(self.root / "fusepo"), "run.export": "export" not in self.wanted}

    def _data(self, build: str) -> dict[str, Any]:
        return {"data.path": self.stages[build].results_dir} if build in self.stages else {}

    def _last(self, problem: str) -> Config:
        last = self.trained.get("fusepo") or self.trained.get("fusesft")
        if last is None:
            raise UserError(f"{problem}: there is neither fusesft nor fusepo among the stages; name one.")
        return last

    def _words(self, defaults: Mapping[str, Any], *sections: str) -> dict[str, str]:
        """Overrides by key, later sections over earlier ones over the defaults; resources left out."""
        words = {key: override(key, value) for key, value in defaults.items()}
        for section in sections:
            words |= self.sections.get(section, {})
        return {key: word for key, word in words.items() if not re.match(r"(sources\.[^=]*\.)?cluster\.", key)}

    def _compose(self, name: str, words: Mapping[str, str]) -> Config:
        words = {"run.results_dir": override("run.results_dir", str(self.root / name))} | dict(words)
        words = {"run.name": override("run.name", f"{self.config.run.name}-{name}")} | words
        for ours, nemo in (("results_dir", "explicit_log_dir"), ("name", "name")):
            if f"exp_manager.{nemo}" in words and words[f"run.{ours}"] not in self._given(f"run.{ours}"):
                del words[f"run.{ours}"]  # a default of the chain, no second opinion
        config = load_config("train", list(words.values()), self.config_dir)
        ranks, unit = self._cluster(name, config, name).num_ranks, replica_ranks(config.model)
        if ranks % unit:
            raise UserError(
                f"cluster: ranks in all = {ranks}, must be a multiple of TP x PP x CP = {unit}; "
                f"{name}.cluster.ntasks_per_node={unit} would work."
            )
        validate(config, ranks)
        return config

    def _given(self, key: str) -> list[str]:
        """What the user says for this key, in any section."""
        return [section[key] for section in self.sections.values() if key in section]

    def _train(self, name: str, words: Mapping[str, str]) -> None:
        config = self._compose(name, words)
        if config.objective.stage != name:
            works = "fusesft.objective=fusesft" if name == "fusesft" else "fusepo.objective=fusepo_ln_dpo"
            raise UserError(f"objective.stage={config.objective.stage}: this stage is {name}; {works} would work.")
        if config.adapter.export == "adapter":
            raise UserError("adapter.export=adapter: later stages read the model; adapter.export=merged would work.")
        if config.adapter.kind == "lora" and not self._given("run.export"):  # whose checkpoints are no model to export
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, export=True))
        if name == "fusesft" and "fusepo" in self.wanted and not config.run.export:
            raise UserError("run.export=false: fusepo starts from its export; run.export=true would work.")
        self.trained[name] = config
        self._add(name, ("fuserl", "train"), config, config.run.results_dir)

    def _cluster(self, name: str, config: object, kind: str) -> ClusterConfig:
        """The stage's resources; a job of one source has its own over those of its kind."""
        section, made = self.sections.get(kind, {}), self.made.get(name)
        words = [word for key, word in section.items() if key.startswith("cluster.")]
        own = f"sources.{made.source}." if made and made.source else "-"
        words += [word.removeprefix(own) for key, word in section.items() if key.startswith(f"{own}cluster.")]
        gpus = self.config.cluster.gpus_per_node if made else None
        if gpus is not None and made and made.gpus is not None:
            gpus = min(gpus, made.gpus) or None
        return resources(self.config.cluster, words, config if isinstance(config, Config) else None, gpus)

    def _add(
        self,
        name: str,
        command: tuple[str, ...],
        config: object = None,
        results_dir: str = "",
        more: Mapping[str, str] = MappingProxyType({}),
        kind: str = "",
    ) -> None:
        kind = kind or name
        folder = self.root / "launch"
        text, path = (to_yaml(config), str(folder / f"{name}.yaml")) if config is not None else ("", "")
        if path:
            command += ("--config-name", path)
        depends_on = tuple(other for read in READS.get(kind, ()) for other in self._of(read))
        parts = [*command, text, *more.values(), *(self.stages[other].hash for other in depends_on)]
        digest = hashlib.sha256("\0".join(parts).encode())
        self.stages[name] = Stage(
            name=name,
            command=command,
            depends_on=depends_on,
            cluster=self._cluster(name, config, kind),
            tasks=self.made[name].tasks if name in self.made else 0,
            trains=isinstance(config, Config),
            resumes=isinstance(config, Config) or name in self.made,
            config=text,
            more_config={str(folder / file): words for file, words in more.items()},
            config_path=path,
            results_dir=str(Path(results_dir).resolve()) if results_dir else str(self.root / name),
            hash=digest.hexdigest()[:16],
        )
