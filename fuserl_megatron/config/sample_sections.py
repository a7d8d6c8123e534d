"""Settings of `fuserl sample`: which prompts, how many answers, and one section for each source that is asked.

A source is a file of the group source/ (conf/source/, or source/ in the user's own directory) or a yaml file named by
its path. `sample_load.py` composes them, `sample_rules.py` holds the rules between fields.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a source draws its answers. What is null is not sent: then the server's own default holds."""

    temperature: float | None = 0.8
    """Divides the logits; 0 takes the most likely token each time, so all answers to a prompt are the same."""
    top_p: float | None = 0.95
    """Draw from the most likely tokens that together have this probability."""
    max_tokens: int = 2048
    """Longest answer in tokens. Answers that reach it are kept, and counted as cut."""
    stop: tuple[str, ...] = ()
    """Texts before which an answer ends."""
    top_k: int | None = None
    """Draw from this many most likely tokens (vLLM, SGLang)."""
    min_p: float | None = None
    """Draw from tokens at least this likely beside the likeliest (vLLM, SGLang)."""
    repetition_penalty: float | None = None
    """Above 1: makes tokens that are in prompt or answer less likely (vLLM, SGLang)."""
    presence_penalty: float | None = None
    """Subtracted from the logits of tokens that the answer has."""
    frequency_penalty: float | None = None
    """Subtracted once for each time that the answer has the token."""
    min_tokens: int | None = None
    """Shortest answer in tokens (vLLM, SGLang)."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further fields of the request, sent as they are. A field that the server's own list does not have is refused."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The server that `fuserl sample` starts, watches and stops where a source has no url."""

    command: str = "vllm serve {model} --host 127.0.0.1 --port {port} --served-model-name {name}"
    """Program and arguments; {model}, {name} and {port} are filled in. Any OpenAI-compatible server will do."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further options: {tensor_parallel_size: 4} becomes --tensor-parallel-size 4, {enforce_eager: true} a bare one."""
    replicas: int = 1
    """Servers side by side. With CUDA each gets its share of CUDA_VISIBLE_DEVICES, in order."""
    ready_seconds: float = 1800.0
    """Longest wait for a server to answer after its start."""
    max_restarts: int = 3
    """How many times a server that died is started again in one run."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source: a model, where it answers, and how it is asked."""

    name: str | None = None
    """The `source` of its records; null takes the file's name."""
    kind: Literal["chat", "completion"] = "chat"
    """chat sends messages and the server applies its template; completion sends a text (base models)."""
    model: str = "???"
    """The name by which the server knows it; for a server of ours a directory or hub name."""
    revision: str | None = None
    """Commit or branch of a hub name, for a server of ours; null takes the newest."""
    url: tuple[str, ...] = ()
    """Addresses of servers that run already, such as http://node7:8000/v1; none: a server is started."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """The server that is started."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key. The key itself never stands in a file."""
    system: str | None = None
    """System message in front of every prompt that has none."""
    demonstrations: str | None = None
    """JSONL file of solved examples (prompt, response) in front of every prompt. The records keep the plain prompt."""
    prompt_format: str = "Question: {prompt}\nAnswer:"
    """completion: one example, {prompt} filled in; behind it come a blank and the response."""
    separator: str = "\n\n"
    """completion: what stands between two examples."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """chat: arguments of the server's template, such as {enable_thinking: false}."""
    reasoning: Literal["apart", "keep"] = "apart"
    """apart: a block of reasoning in front of the answer (<think>...</think>) goes into a field of its own."""
    tokenizer: str | None = None
    """Directory or hub name of the source's tokenizer, with which the start of a run proves what the server makes of a
    prompt and counts tokens. null takes model where that is a directory."""
    bos: Literal["auto", "one", "none"] = "auto"
    """How prompts must begin: auto takes the tokenizer's word for whether there is a begin-of-text token."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How answers are drawn."""
    logprobs: bool = False
    """Have the server say how likely its own answer was; the row then has source_mean_logps for this source alone.
    `fuserl logprobs` gives the values of all sources."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The name under which sampling.max_tokens is sent; some paid models take the second one only."""
    send_seed: bool = True
    """Every request has a seed of its own; false for a server that refuses the field."""
    max_in_flight: int = 256
    """Most requests at one time to one address. The number starts at 64, rises while that brings more tokens a second,
    and is halved when the server says that it has too much to do."""
    timeout: float = 1800.0
    """Seconds until an unanswered request is given up and sent again."""
    price_input: float | None = None
    """Price of a million prompt tokens, for --dry-run and the report."""
    price_output: float | None = None
    """Price of a million tokens of answers."""


@dataclass(frozen=True, kw_only=True)
class AskConfig:
    """What every run that asks sources is told."""

    output: str = "???"
    """Directory to write: a folder for each source."""
    sources: tuple[str, ...] = ()
    """Names in the group source/, or paths of yaml files. `sources.NAME.KEY=VALUE` changes a setting of one."""
    max_failures: float = 0.01
    """Share of the answers that may fail before the run stops. (Unless it is 0, ten may fail in any case.)"""
    max_attempts: int = 5
    """How many times one answer is tried. A busy or dead server takes none of them."""
    patience: float = 1800.0
    """Seconds without any answer, from servers that run elsewhere, after which the run stops."""
    grace: float = 60.0
    """Seconds that requests under way are given to end after Ctrl-C, SIGTERM or SIGUSR1."""
    retry_failed: bool = False
    """Ask again for answers that failed in a run that is finished otherwise."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(AskConfig):
    """Responses of every source to every prompt (`fuserl sample`)."""

    prompts: tuple[str, ...] = ()
    """JSONL or parquet files, globs, or hub data sets; a row is a `prompt` (text or messages), and may have `meta`."""
    n: int = 5
    """Answers of each source to each prompt. A larger number later samples only what is missing."""
    seed: int = 0
    """Another number gives other answers. Every request's own seed follows from this, the prompt and the source."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """stop at the first prompt that cannot be used with file and line, or leave such prompts out and count them."""
    heldout: tuple[str, ...] = ()
    """Files with prompts that must not be trained on: prompts that overlap with one are counted."""
    heldout_ngram: int = 13
    """Words in a row that two prompts must share to overlap; shorter prompts must be the same."""
    heldout_action: Literal["count", "drop"] = "count"
    """drop: prompts that overlap are left out."""
    shards: int = 1
    """Parts into which the prompts are divided by what they say, each a folder of its own: tasks of an array job."""
    shard: int | None = None
    """The part to sample, from 0. null: the task's number in an array job, elsewhere all parts one after the other."""
    on_too_long: Literal["stop", "allow"] = "stop"
    """stop before sampling when the longest prompt and max_tokens exceed the server's context; allow: such answers are
    cut, or fail, and are counted."""


@dataclass(frozen=True, kw_only=True)
class LogprobsConfig(AskConfig):
    """Log-probabilities of finished answers under every source (`fuserl logprobs`)."""

    samples: tuple[str, ...] = ()
    """Directories that `fuserl sample` wrote, or files of records (prompt, source, response) in any known format."""
    top_k: int = 0
    """Keep this many of the likeliest tokens at each place of an answer, too; the server's limit is usually 20."""
