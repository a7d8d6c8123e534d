"""One seed of one world: its data sets, and its trainings by `fuserl_megatron.train`, each scored on held-out prompts.

A finished training is one JSON line in SEED.jsonl; what stands there is not repeated. Models that no other method
starts from are removed after scoring.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

from methods import BEST, DEVELOPMENT_SEED, METHODS, chosen, settings_of
from world import (
    NUM_SAMPLES,
    NUM_SOURCES,
    SKILLS_FOLDER,
    WORLDS,
    is_careless,
    is_right,
    make_prompts,
    noisy_reward,
    responses,
    reward_accuracy,
    with_shuffled_rewards,
    write_records,
)

TARGET = SKILLS_FOLDER / "target"
PER_SKILL = {"sft": 20, "po": 40}
HELD_OUT = {"test": make_prompts("noisy/held-out", 100)}
HELD_OUT["development"] = make_prompts("noisy/development", 50, {task.prompt for task in HELD_OUT["test"]})
NOT_TRAINED_ON = {task.prompt for tasks in HELD_OUT.values() for task in tasks}
LONGEST_ANSWER = 11  # tokens: six letters, two marks, the end, and room
SCALE = 0.1  # of the rewards where the gaps must lie in [0, 1]


class Seed:
    """Prompts, data sets, models and results of one seed in one world; everything is made when it is first asked for.

    Args:
        place: directory of all runs.
        world: name in WORLDS.
        seed: of prompts, responses, reward errors, data order and sampling.
        tries: of the search, from which the rates are chosen.
        tasks: held-out prompts; None takes those of the test, or the development ones for its seed.
    """

    def __init__(self, place: Path, world: str, seed: int, tries: dict | None = None, tasks: list | None = None):
        self.world, self.seed, self.tries = world, seed, tries or {}
        self.place = place / world.replace(" ", "_") / str(seed)
        self.place.mkdir(parents=True, exist_ok=True)
        self.file, self.log = self.place.with_suffix(".jsonl"), self.place / "log.txt"
        self.tasks = tasks or HELD_OUT["development" if seed == DEVELOPMENT_SEED else "test"]
        drawn = make_prompts(f"noisy/{world}/{seed}", sum(PER_SKILL.values()), NOT_TRAINED_ON)
        end = 6 * PER_SKILL["sft"]
        self.prompts = {"sft": drawn[:end], "po": drawn[end:]}
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.lines = {(line["method"], line["rates"]): line for line in map(json.loads, lines)}

    def result(self, name: str, rates: str | None = None) -> dict:
        """The line of a method, with its chosen rates unless others are given; trains where there is none."""
        rates = self.rates(name) if rates is None else rates
        if (name, rates) not in self.lines:
            self._record(name, rates, self.model(name, rates))
            if all(name not in (m.start, m.rates_of) for m in METHODS.values()):
                shutil.rmtree(self._directory(name, rates))
        return self.lines[name, rates]

    def rates(self, name: str) -> str:
        """The rates of a method."""
        return "" if name == "target" else chosen(name, self.tries)

    def model(self, name: str, rates: str | None = None) -> Path:
        """The Hugging Face directory of a method's model, trained where it is not there."""
        if name == "target":
            return TARGET
        rates = self.rates(name) if rates is None else rates
        directory = self._directory(name, rates)
        if not (directory / "hf" / "config.json").exists():
            from fuserl_megatron import load_config, train

            settings = [
                *("trainer.accelerator=cpu", "trainer.precision=32", "data.seq_length=256"),
                *("data.global_batch_size=24", f"data.micro_batch_size={_rows(name)}"),
                "exp_manager.checkpoint_callback_params.every_n_train_steps=null",
                *(f"model.path={self.model(METHODS[name].start)}", f"data.path={self.data(METHODS[name].data)}"),
                *(f"run.seed={self.seed}", f"run.results_dir={directory}", *settings_of(name, rates)),
            ]
            with self._into_log():
                train(load_config("train", settings))
        return directory / "hf"

    def data(self, which: str) -> Path:
        """A built data set."""
        from fuserl_megatron import build, load_config

        output = self.place / "data" / which
        if not (output / "manifest.json").exists():
            output.parent.mkdir(exist_ok=True)
            records = write_records(output.with_suffix(".jsonl"), self._records(which))
            world, tau = WORLDS[self.world], ["reward_temperature=1"]  # own, mixed, scaled: weights are set or unused
            if which in ("sft", "po", "shuffled"):
                tau = ["reward_temperature=auto", f"reward_accuracy={reward_accuracy(world)}"]
            with self._into_log():
                build(load_config("build", [f"inputs=[{records}]", f"output={output}", f"tokenizer={TARGET}", *tau]))
        return output

    def _records(self, which: str) -> list[dict]:
        if which in PER_SKILL:
            return responses(WORLDS[self.world], self.seed, which, self.prompts[which])
        if which == "own":
            return self._own_samples()
        records = self._records("po")
        if which == "shuffled":
            return with_shuffled_rewards(records, self.seed)
        if which == "scaled":
            return [{**record, "reward": round(SCALE * record["reward"], 5)} for record in records]
        own = [{**record, "source": "target"} for record in self._own_samples() if record["source"] == "own0"]
        return records + own

    def _own_samples(self) -> list[dict]:
        """The FuseSFT model's own answers, as many as the sources gave and as if by as many sources."""
        import torch
        from training import sample
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model, prompts = self.model("FuseSFT"), [task.prompt for task in self.prompts["po"]]
        torch.manual_seed(self.seed)
        with self._into_log():
            network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
            tokenizer = AutoTokenizer.from_pretrained(model)
        records = []
        for source in range(NUM_SOURCES):
            for _ in range(NUM_SAMPLES):
                for prompt, text in zip(
                    prompts, sample(network, tokenizer, prompts, 0.9, max_new_tokens=LONGEST_ANSWER), strict=True
                ):
                    if response := text.split(tokenizer.eos_token)[0].strip():
                        value = noisy_reward(WORLDS[self.world], self.seed, prompt, response)
                        records.append(dict(prompt=prompt, source=f"own{source}", response=response, reward=value))
        return records

    def _record(self, name: str, rates: str, model: Path) -> None:
        """Score the model's greedy answers and write the line."""
        from evaluate import greedy_answers

        with self._into_log():
            answers = greedy_answers(model, [task.prompt for task in self.tasks], 256, LONGEST_ANSWER)
        both = [(task.prompt, answer) for task, answer in zip(self.tasks, answers, strict=True)]
        right = [is_right(*pair) for pair in both]
        line = {"world": self.world, "seed": self.seed, "method": name, "rates": rates}
        if name != "target":
            line |= self._origin(name)
        line |= {
            "model": _weights_hash(model),
            "accuracy": round(100 * sum(right) / len(right), 2),
            "careless": round(100 * sum(is_careless(*pair) for pair in both) / len(both), 2),
            "right": f"{int(''.join(str(int(r)) for r in right), 2):0{len(right) // 4}x}",
        }
        with open(self.file, "a") as out:
            out.write(json.dumps(line) + "\n")
        self.lines[name, rates] = line
        print(f"{self.world}, seed {self.seed}: {name} [{rates}] {line['accuracy']:.1f}", flush=True)

    def _origin(self, name: str) -> dict:
        """What the model was made from: the settings in full, the data set and the model before."""
        method = METHODS[name]
        manifest = json.loads((self.data(method.data) / "manifest.json").read_text())
        start = _weights_hash(self.model(method.start))
        of_data = {"data": manifest["hash"][:16], "tau": round(manifest["reward_temperature"], 4)}
        return {"settings": " ".join(method.settings), **of_data, "start": start}

    def _directory(self, name: str, rates: str) -> Path:
        words = f"{name} {rates}" if self.seed == DEVELOPMENT_SEED else name
        return self.place / "".join(c if c.isalnum() or c in ".-" else "_" for c in words)

    @contextlib.contextmanager
    def _into_log(self):
        with open(self.log, "a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            yield


def _rows(name: str) -> int:
    """Rows of a micro-batch: as many as 24 prompts of this method fill, about."""
    method = METHODS[name]
    if BEST in method.settings:
        return 3
    return 4 if "objective=fusesft" in method.settings or "objective=fusepo_rloo" in method.settings else 7


def _weights_hash(model: Path) -> str:
    """The first 16 digits of the sha256 of a model's weights."""
    from fuserl_megatron.util.files import file_sha256

    return file_sha256(model / "model.safetensors")[:16]


def quiet_and_single_threaded() -> None:
    """One thread, so that every sum is formed in the same order; no progress bars."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
