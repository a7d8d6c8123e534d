"""Settings of `fuserl score`: what is scored, by which rewards, how their values become one. See `schema.py`.

A reward is a file of the group reward/ (conf/reward/, or reward/ in the user's own directory) or written out on the
command line; its key `kind` says which of the classes in KINDS it is. `score_load.py` composes and checks them.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

# fmt: off
REFUSALS = ("i can't help", "i cannot help", "i can't assist", "i cannot assist", "i can't provide", "i cannot provide",
            "i'm sorry, but i can", "i am sorry, but i can", "i'm unable to", "i am unable to", "i won't be able to",
            "as an ai")
# fmt: on


@dataclass(frozen=True, kw_only=True)
class ModelReward:
    """A reward model that is loaded here, with transformers. No code of its directory is run."""

    kind: Literal["model"] = "model"
    """This class."""
    model: str = "???"
    """Hugging Face directory or hub name: a sequence classification model with one label, or ArmoRM."""
    head: Literal["score", "armorm"] = "score"
    """score: one linear head on the last token. armorm: ArmoRM's 19 objectives and its gate."""
    chat_template: str | None = None
    """Jinja file that replaces the template of the model's tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto: bfloat16 on a GPU, float32 on the CPU. The head computes in float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where torch sees one."""
    max_length: int | None = None
    """Longest prompt and answer in tokens; longer ones get no value. null takes the model's own limit."""
    batch_tokens: int = 16384
    """Tokens of a batch, padding included. Changes speed and memory, not values."""


@dataclass(frozen=True, kw_only=True)
class EndpointReward:
    """A reward model behind a vLLM server (`vllm serve MODEL --runner pooling`)."""

    kind: Literal["endpoint"] = "endpoint"
    """This class."""
    url: tuple[str, ...] = ()
    """The server's address, or those of several servers of the same model, such as http://127.0.0.1:8000."""
    api: Literal["classify", "pooling"] = "classify"
    """Which of the server's interfaces is asked. /score is for pairs of texts and gives no reward."""
    model: str | None = None
    """The name under which the server has the model; null where it has just one."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; null for none."""
    in_flight: int = 64
    """Requests at one time, over all servers."""
    timeout: float = 300.0
    """Seconds for one request."""
    attempts: int = 5
    """How often a request that failed by the server's fault is sent before its row is given up."""
    trust_scale: bool = False
    """Take the values even where it cannot be proven that the server has left its sigmoid out."""


@dataclass(frozen=True, kw_only=True)
class RuleReward:
    """A Python function, called as function(prompt, response, record, **arguments) in worker processes."""

    kind: Literal["rule"] = "rule"
    """This class."""
    function: str = "???"
    """package.module:function, from the current directory or what is installed. It gives a number, or names with
    numbers of which one is called reward."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments, by name."""
    time_limit: float = 10.0
    """Seconds of wall-clock time for one answer, then the process is killed."""
    memory_gib: float = 2.0
    """GiB of address space that a process may take besides what its imports have."""
    output_mib: float = 1.0
    """MiB that one call may print, and the largest file that it may write."""
    network: Literal["off", "on"] = "off"
    """off: no network, where the kernel allows to take it away (a warning says where it does not)."""
    workers: int | Literal["auto"] = "auto"
    """Processes; auto: one for each core."""


KINDS = {"model": ModelReward, "endpoint": EndpointReward, "rule": RuleReward}
Reward = ModelReward | EndpointReward | RuleReward


@dataclass(frozen=True, kw_only=True)
class CombineConfig:
    """How the values of several rewards become the record's reward. Changing it scores nothing again."""

    method: Literal["sum", "product"] = "sum"
    """sum: weighted sum. product: product of the values, each to the power of its weight (values >= 0)."""
    weights: dict[str, Any] = field(default_factory=dict)
    """Reward -> weight; those left out have 1. A part of a reward is named REWARD.PART and has 0 unless it is here."""
    standardize: Literal["none", "prompt", "dataset"] = "none"
    """Bring each reward to mean 0 and deviation 1 before: over the answers to one prompt, or all. Only with sum."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What happens to unusual answers. All are counted. Changing it scores at most what was left out before."""

    truncated: Literal["auto", "keep", "drop", "penalty"] = "auto"
    """Answers cut by the token limit. auto: drop where a reward model judges, keep where only rules do."""
    truncated_penalty: float = 1.0
    """With truncated=penalty: taken from the combined reward."""
    empty: Literal["drop", "stop"] = "drop"
    """Answers of white space only. They cannot be trained on."""
    refused: Literal["keep", "drop", "penalty"] = "keep"
    """Answers that begin with one of refusal_phrases."""
    refused_penalty: float = 1.0
    """With refused=penalty: taken from the combined reward."""
    refusal_phrases: tuple[str, ...] = REFUSALS
    """Beginnings of refusals, in lower case."""
    duplicated: Literal["drop", "keep"] = "drop"
    """The same text once more, from the same source to the same prompt. drop keeps the first."""
    failed: Literal["drop", "stop", "value"] = "drop"
    """Answers for which a reward has no value (too long, a rule that crashed)."""
    failed_value: float = 0.0
    """With failed=value: the missing reward's value, before weights and standardisation."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """One directory of scored responses (`fuserl score`)."""

    samples: tuple[str, ...] = ()
    """Directories that `fuserl sample` wrote, or files of records (prompt, source, response) in any known format."""
    output: str = "???"
    """Directory to write; `fuserl build inputs=[output]` reads it."""
    rewards: tuple[str, ...] = ()
    """Names in the group reward/. `rewards.NAME.KEY=VALUE` changes a setting of one, or writes out one of your own."""
    logprobs: tuple[str, ...] = ()
    """Directories that `fuserl logprobs` wrote for these answers: the records get their values as source_mean_logps."""
    combine: CombineConfig = field(default_factory=CombineConfig)
    """How their values become one."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Truncated, empty, refused, duplicated and failed answers."""
    rescore: tuple[str, ...] = ()
    """Rewards whose values are thrown away and made anew, such as of a rule whose code has changed."""
    heldout: tuple[str, ...] = ()
    """Files with prompts that must not be trained on: those of the samples that overlap with one are counted."""
    heldout_ngram: int = 13
    """Words in a row that two prompts must share to overlap; shorter prompts must be the same."""
    heldout_action: Literal["count", "drop"] = "count"
    """What happens to samples of such prompts."""
