"""The two kinds of model that `verify` compares, each read and run through its own native path, in fp32 on the CPU.

    HuggingFaceSide    safetensors files; transformers computes
    MegatronSide       distributed checkpoint; core loads it into a GPTModel, which computes

Shapes: B rows, S tokens per row, T tokens, V vocabulary, H hidden.
"""

from pathlib import Path
from typing import Any

import torch

from fuserl_megatron.checkpoint.reader import DistReader
from fuserl_megatron.config.schema import ModelConfig, TrainerConfig
from fuserl_megatron.convert.hf_config import ModelShape, read_config
from fuserl_megatron.convert.hf_io import check_model_directory
from fuserl_megatron.convert.layout import hf_tensors_from_megatron
from fuserl_megatron.convert.megatron_checkpoint import (
    check_checkpoint,
    find_checkpoint,
    iteration_folder,
    num_tensors,
    stored_key,
)
from fuserl_megatron.convert.names import hf_names, hf_shapes
from fuserl_megatron.convert.shards import ShardReader, check_num_layers, check_tensors
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.hub import TOKENIZER_FILES

Tokens = list[int]


class HuggingFaceSide:
    """A Hugging Face directory."""

    kind = "Hugging Face"

    def __init__(self, path: Path):
        self.path = check_model_directory(path)
        self.shape: ModelShape = read_config(self.path)
        self.tokenizer_dir = self.path
        self._reader = ShardReader(self.path)
        check_num_layers(self.shape, len(self._reader.tensors), self.path)
        self.problem = _first_problem(lambda: check_tensors(self._reader, self.shape))

    def extra_names(self) -> list[str]:
        """Tensors in the files that the config does not call for, harmless ones left out."""
        if self.problem is None:
            return []
        return sorted(set(self._reader.tensors) - set(hf_shapes(self.shape)))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The Hugging Face tensors of one Megatron parameter that are there."""
        names = hf_names(name, self.shape)
        return {hf: self._reader.read(hf) for hf in names if hf in self._reader.tensors}

    def load(self) -> None:
        """Open the model with transformers."""
        import transformers
        from transformers import AutoModelForCausalLM, GenerationConfig

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(
            self.path, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, trust_remote_code=False
        ).eval()
        self._model.generation_config = GenerationConfig()  # no penalties, no sampling: the plain argmax

    @torch.no_grad()
    def token_logps(self, tokens: Tokens) -> torch.Tensor:
        """Log-probabilities [T - 1] of all tokens but the first, natural logarithm."""
        ids = torch.tensor(tokens)
        logits = self._model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]

    @torch.no_grad()
    def greedy(self, prompts: list[Tokens], count: int) -> list[Tokens]:
        """The `count` most probable next tokens after each prompt, one after the other."""
        ids_BS, real_BS = left_padded(prompts)
        out = self._model.generate(
            input_ids=ids_BS,
            attention_mask=real_BS.long(),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return out[:, ids_BS.shape[1] :].tolist()

    def close(self) -> None:
        """Let go of the model."""
        self._model = None


class MegatronSide:
    """A Megatron distributed checkpoint."""

    kind = "Megatron"

    def __init__(self, path: Path, hf: str | Path | None = None):
        found = find_checkpoint(path, hf)
        self.path, self._folder = path, found.folder
        self._config_dir, self.tokenizer_dir = found.config_dir, found.tokenizer_dir
        self.shape: ModelShape = read_config(found.config_dir)
        self._reader = DistReader(found.folder)
        check_num_layers(self.shape, num_tensors(self._reader), found.folder)
        self.problem = _first_problem(lambda: check_checkpoint(self._reader, self.shape))

    def extra_names(self) -> list[str]:
        """Nothing: keys the config does not know are this side's `problem`."""
        return []

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The Hugging Face tensors of one Megatron parameter that are there."""
        key, layer = stored_key(self._reader, name)
        stored = self._reader.keys.get(key)
        if stored is None or (layer is not None and (layer,) >= stored.size[:1]):
            return {}
        full = self._reader.read(key, layer)
        try:
            return dict(hf_tensors_from_megatron(name, full, self.shape))
        except RuntimeError:  # not the config's sizes, which is this side's `problem`: no tensor to compare
            return {}

    def load(self) -> None:
        """Build core's model and load the checkpoint with core's own loader."""
        from fuserl_megatron.mcore import checkpoint, parallel
        from fuserl_megatron.mcore.attention import SegmentAttention
        from fuserl_megatron.mcore.model import build_model

        model = ModelConfig(path=str(self._config_dir), transformer_impl="local")
        layout = parallel.initialize(model, TrainerConfig(accelerator="cpu", precision="32"))
        self._target: Any = build_model(self.shape, model, layout, torch.float32)
        checkpoint.load(self._target, self._folder, advice="; is it of this model?")
        self._chunk: Any = self._target.chunks[0].eval()
        self._attention: Any = [m for m in self._chunk.modules() if isinstance(m, SegmentAttention)]

    def _hidden(self, ids_BS: torch.Tensor, positions_BS: torch.Tensor, visible_BSS: torch.Tensor) -> torch.Tensor:
        self._chunk.rotary_pos_emb.positions_BS = positions_BS
        return self._chunk(ids_BS, positions_BS, visible_BSS.unsqueeze(1))

    @torch.no_grad()
    def token_logps(self, tokens: Tokens) -> torch.Tensor:
        """Log-probabilities [T - 1] of all tokens but the first, natural logarithm."""
        from fuserl_megatron.mcore.logprob import vocab_parallel_logps

        ids = torch.tensor(tokens)
        count = len(tokens) - 1
        causal = torch.ones(1, count, count, dtype=torch.bool).tril()
        hidden_TH = self._hidden(ids[None, :-1], torch.arange(count)[None], causal)[0]
        return vocab_parallel_logps(
            hidden_TH,
            self._target.output_weight(),
            ids[1:],
            first_row=0,
            num_valid=self.shape.vocab_size,
            group=None,
            chunk_size=256,
            rule=self._target.logit_rule,
        )

    @torch.no_grad()
    def greedy(self, prompts: list[Tokens], count: int) -> list[Tokens]:
        """The `count` most probable next tokens after each prompt, one after the other."""
        ids_BS, real_BS = left_padded(prompts)
        positions_BS = (real_BS.long().cumsum(1) - 1).clamp(min=0)
        length = ids_BS.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool).tril() & real_BS[:, None, :]
        visible = visible | torch.eye(length, dtype=torch.bool)  # padding sees itself: a softmax over nothing is NaN
        for module in self._attention:
            module.forward = _with_cache(module.forward)
        try:
            out = []
            for _ in range(count):
                hidden_BH = self._hidden(ids_BS, positions_BS, visible)[:, -1]
                logits_BV = (hidden_BH @ self._target.output_weight().t())[:, : self.shape.vocab_size]
                ids_BS = logits_BV.argmax(-1, keepdim=True)
                out.append(ids_BS)
                positions_BS = positions_BS[:, -1:] + 1
                real_BS = torch.cat((real_BS, torch.ones_like(ids_BS, dtype=torch.bool)), dim=1)
                visible = real_BS[:, None, :]
        finally:
            for module in self._attention:
                del module.forward  # the class's own again
        return torch.cat(out, dim=1).tolist()

    def close(self) -> None:
        """Let go of the model and the process group."""
        from fuserl_megatron.mcore import parallel

        self._chunk = self._target = self._attention = None
        parallel.shutdown()


Side = HuggingFaceSide | MegatronSide


def open_side(path: str | Path, hf: str | Path | None = None) -> Side:
    """A model to compare; `hf` as in `find_checkpoint`.

    Raises:
        UserError: neither a Hugging Face directory nor a Megatron checkpoint, or damaged.
    """
    path = Path(path)
    if (path / "config.json").is_file() or iteration_folder(path) is None:
        return HuggingFaceSide(path)
    return MegatronSide(path, hf)


def tokenizer_of(side: Side):
    """The side's tokenizer; None when it has none."""
    if not any((side.tokenizer_dir / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(side.tokenizer_dir, trust_remote_code=False)
    except MemoryError:  # no fault of the files
        raise
    except Exception as error:  # broken tokenizer files raise anything
        raise UserError(
            f"{side.tokenizer_dir}: the tokenizer cannot be opened ({error}); copy its files again"
        ) from None


def left_padded(rows: list[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, S] with 0 in front of the shorter rows, and which of them are real (bool)."""
    length = max(map(len, rows))
    ids_BS = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    real_BS = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return ids_BS, real_BS


def _with_cache(forward):
    """The attention's forward with the keys and values [S, B, G, D] of earlier calls in front."""
    kept: list[torch.Tensor] = []

    def with_cache(query, key, value, attention_mask, **rest):
        if kept:
            key, value = torch.cat((kept[0], key)), torch.cat((kept[1], value))
        kept[:] = key, value
        return forward(query, key, value, attention_mask, **rest)

    return with_cache


def _first_problem(check) -> str | None:
    try:
        check()
    except UserError as error:
        return str(error)
    return None
