"""ArmoRM's head (Wang et al. 2024, arXiv 2406.12845), computed here from its safetensors; its own code is not run.

A Llama body; a linear layer gives 19 objectives from the hidden state of the last token; a matrix takes the verbosity
out of them; a small network looks at the prompt alone and says how much each objective counts:

    score = sum_j gate_j(prompt) (objectives @ transform)_j        gate = scale * softmax(MLP(h_prompt) / temperature)

h_prompt is the hidden state where the last user turn ends, before the header of the assistant's turn. B rows of a
batch, S tokens, H hidden size, J objectives.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuserl_megatron.making.conversation import Conversation
from fuserl_megatron.making.reward_model import quiet, refuse_missing, refuse_not_finite
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.json_files import read_json
from fuserl_megatron.util.text import first_line

# fmt: off
OBJECTIVES = (
    "helpsteer-helpfulness", "helpsteer-correctness", "helpsteer-coherence", "helpsteer-complexity",
    "helpsteer-verbosity", "ultrafeedback-overall_score", "ultrafeedback-instruction_following",
    "ultrafeedback-truthfulness", "ultrafeedback-honesty", "ultrafeedback-helpfulness", "beavertails-is_safe",
    "prometheus-score", "argilla-overall_quality", "argilla-judge_lm", "code-complexity", "code-style",
    "code-explanation", "code-instruction-following", "code-readability",
)
# fmt: on
TURN = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
"""End of the user's turn and header of the assistant's, in Llama 3's template; the gate reads at its first token."""


class ArmoHead(torch.nn.Module):
    """Objectives, transform and gate, in fp32."""

    objectives_JH: Tensor
    transform_JJ: Tensor
    scale: Tensor

    def __init__(self, weights: dict[str, Tensor], temperature: float, turn: Sequence[int]):
        super().__init__()
        weights = {name: value.float() for name, value in weights.items()}
        self.turn, self.temperature = list(turn), temperature
        self.register_buffer("objectives_JH", weights["regression_layer.weight"])
        self.register_buffer("transform_JJ", weights["reward_transform_matrix"])
        self.register_buffer("scale", weights["gating.logit_scale"].reshape(()))
        layers = []
        for i in range(num_layers(weights)):
            weight, bias = weights[f"gating.layers.{i}.weight"], weights.get(f"gating.layers.{i}.bias")
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
            layers += [layer, torch.nn.ReLU()]
        self.gate = torch.nn.Sequential(*layers[:-1])

    def forward(self, last_BH: Tensor, prompt_BH: Tensor) -> tuple[Tensor, Tensor]:
        """([B] scores, [B, J] objectives) from the hidden states of the last token and of the end of the prompt."""
        objectives_BJ = last_BH.float() @ self.objectives_JH.T
        gate_BJ = self.scale * torch.softmax(self.gate(prompt_BH.float()) / self.temperature, dim=1)
        return (gate_BJ * (objectives_BJ @ self.transform_JJ)).sum(dim=1), objectives_BJ

    def outcomes(self, hidden_BSH: Tensor, last_B: Tensor, rows_BS: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """{"value", "parts"} of each row; {"error"} for one in which the gate's place is not found."""
        places = [last_place(row, self.turn) for row in rows_BS]
        rows_B = torch.arange(len(rows_BS), device=last_B.device)
        prompt_B = torch.tensor([max(place, 0) for place in places], device=last_B.device)
        scores_B, objectives_BJ = self(hidden_BSH[rows_B, last_B], hidden_BSH[rows_B, prompt_B])
        count = objectives_BJ.shape[1]
        names = list(OBJECTIVES) if count == len(OBJECTIVES) else [str(i) for i in range(count)]
        found: list[dict[str, Any]] = []
        for place, score, objectives in zip(places, scores_B.tolist(), objectives_BJ.tolist(), strict=True):
            if place < 0:
                found.append({"error": "no assistant turn in Llama 3's form"})
            else:
                found.append({"value": score, "parts": dict(zip(names, objectives, strict=True))})
        return found


def last_place(row: Sequence[int], pattern: Sequence[int]) -> int:
    """Where the last occurrence of the pattern begins; -1 for none."""
    row, pattern = list(row), list(pattern)
    starts = range(len(row) - len(pattern), -1, -1)
    return next((i for i in starts if row[i : i + len(pattern)] == pattern), -1)


def num_layers(weights: dict[str, Tensor]) -> int:
    """Linear layers of the gate."""
    return sum(name.startswith("gating.layers.") and name.endswith(".weight") for name in weights)


def load_armorm(
    where: str, directory: str, config: Any, dtype: torch.dtype, conversation: Conversation
) -> tuple[torch.nn.Module, ArmoHead]:
    """Body and head.

    Raises:
        UserError: not an ArmoRM, weights that are missing, a tokenizer without Llama 3's turns.
    """
    from transformers import LlamaModel

    values = read_json(Path(directory, "config.json"))
    try:
        with quiet():
            loaded: Any = LlamaModel.from_pretrained(directory, config=config, dtype=dtype, output_loading_info=True)
    except Exception as error:
        raise UserError(f"{where}.model={directory}: cannot be loaded as a Llama model ({first_line(error)})") from None
    body, info = loaded
    refuse_missing(where, directory, info["missing_keys"])
    refuse_not_finite(where, directory, body)
    weights = head_weights(Path(directory))
    layers = values.get("gating_n_hidden", 3) + 1
    needed = ["regression_layer.weight", "reward_transform_matrix", "gating.logit_scale"]
    needed += [f"gating.layers.{i}.weight" for i in range(layers)]
    refuse_missing(where, directory, set(needed) - set(weights))
    head = ArmoHead(weights, values.get("gating_temperature", 10), turn := conversation.ids(TURN))
    refuse_not_finite(where, directory, head)
    probe = conversation.text((("user", "Hi"),), "Hello")
    if last_place(conversation.ids(probe), turn) < 0:
        raise UserError(f"{where}.head=armorm: the chat template of {directory} has no turns of Llama 3's form")
    return body, head


def head_weights(directory: Path) -> dict[str, Tensor]:
    """Everything in the safetensors files that is not the body's, by name."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys() if not name.startswith("model.")}
    return found
