"""Prompts in one canonical form: what makes two records the same prompt, and what a chat template is given."""

import json
from typing import Any

from fuserl_megatron.records.inputs import Place
from fuserl_megatron.util.errors import UserError

Message = tuple[str, str] | tuple[str, str | None, str]
"""(role, content), or (role, content or None, JSON text of the fields that go with this role)."""
Messages = tuple[Message, ...]
MORE_FIELDS = {
    "assistant": ("tool_calls", "reasoning_content", "thinking", "reasoning"),
    "tool": ("tool_call_id", "name"),
}
"""Fields of a message beside role and content that the template is given, by role."""


class BadRecord(UserError):
    """One record that cannot be used.

    Attributes:
        place: file and line.
        kind: short name under which such records are counted.
    """

    def __init__(self, place: Place, kind: str, problem: str):
        super().__init__(f"{place[0]}:{place[1]}: {problem}")
        self.place, self.kind, self.problem = place, kind, problem


def canonical_prompt(place: Place, prompt: Any) -> Messages:
    """The messages of a prompt; a string is a single user message, text parts are put together.

    Raises:
        BadRecord: neither a string nor a list of {"role", "content"}, empty, parts that are no text, or ending with an
            assistant message.
    """
    if isinstance(prompt, str):
        return (("user", text_field(place, "prompt", prompt)),)
    if not isinstance(prompt, list):
        wanted = 'a string or a list of {"role", "content"} messages'
        raise BadRecord(place, "wrong_type_prompt", f"field 'prompt' must be {wanted}, not {shown(prompt)}")
    if not prompt:
        raise BadRecord(place, "empty_prompt", "field 'prompt' is an empty list: it needs at least one message")
    messages = tuple(_message(place, f"prompt[{i}]", m, i == len(prompt) - 1) for i, m in enumerate(prompt))
    if messages[-1][0] == "assistant":
        problem = "field 'prompt' ends with an assistant message: the answer belongs into 'response'"
        raise BadRecord(place, "prompt_ends_with_assistant", problem)
    return messages


def canonical_tools(place: Place, tools: Any) -> str:
    """JSON text of the tools a prompt offers; empty for none.

    Raises:
        BadRecord: neither a list of objects nor the JSON text of one.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise BadRecord(place, "wrong_type_tools", f"field 'tools' is not JSON: {shown(tools)}") from None
    if tools is None or tools == []:
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord(place, "wrong_type_tools", f"field 'tools' must be a list of objects, not {shown(tools)}")
    return _json(place, "tools", tools, "tools")


def as_dicts(messages: Messages) -> list[dict[str, Any]]:
    """Messages as templates take them: role, content (absent where it is null), further fields."""
    chat = []
    for role, content, *more in messages:
        message = {"role": role} if content is None else {"role": role, "content": content}
        chat.append(message | json.loads(more[0]) if more else message)
    return chat


def _message(place: Place, name: str, message: Any, last: bool) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _no_message(place, name, message)
    role = text_field(place, f"{name}.role", message["role"], "prompt")
    given = {key: message[key] for key in MORE_FIELDS.get(role, ()) if message.get(key) not in (None, [])}
    content = message.get("content")
    if isinstance(content, list):
        content = _joined_parts(place, f"{name}.content", content)
    if not isinstance(content, str) and (content is not None or "tool_calls" not in given):
        raise _no_message(place, name, message)
    if "tool_calls" in message and message["tool_calls"] and "tool_calls" not in given:
        problem = f"field {name!r} has tool_calls, but its role is {role!r}: the assistant calls tools"
        raise BadRecord(place, "wrong_type_prompt", problem)
    if content is not None:
        # an empty system or tool message means something; an empty last message is no question
        check = text_field if last and role != "tool" else encodable
        content = check(place, f"{name}.content", content, "prompt")
    return (role, content, _json(place, name, given, "prompt")) if given else (role, str(content))


def _no_message(place: Place, name: str, value: Any) -> BadRecord:
    wanted = f'field {name!r} must be {{"role": string, "content": string}}, not {shown(value)}'
    return BadRecord(place, "wrong_type_prompt", wanted)


def _joined_parts(place: Place, name: str, parts: list) -> str:
    texts = []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            problem = f'field \'{name}[{i}]\' must be {{"type": "text", "text": string}}, not {shown(part)}'
            raise BadRecord(place, "not_text_prompt", f"{problem}: only text can be trained on")
        texts.append(part["text"])
    return "".join(texts)


def _json(place: Place, name: str, value: Any, kind: str) -> str:
    """Keys stay in their order: templates print them."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise BadRecord(place, f"wrong_type_{kind}", f"field {name!r} holds something that is not JSON") from None
    return encodable(place, name, text, kind)


def text_field(place: Place, name: str, value: Any, kind: str | None = None) -> str:
    """A string with something other than white space in it."""
    if not isinstance(value, str):
        raise BadRecord(place, f"wrong_type_{kind or name}", f"field {name!r} must be a string, not {shown(value)}")
    if not value.strip():
        raise BadRecord(place, f"empty_{kind or name}", f"field {name!r} is empty")
    return encodable(place, name, value, kind)


def encodable(place: Place, name: str, value: str, kind: str | None = None) -> str:
    """A string that is valid Unicode."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(
            place, f"invalid_text_{kind or name}", f"field {name!r} contains half a surrogate pair"
        ) from None
    return value


def shown(value: Any) -> str:
    """Type and beginning of a value, for messages."""
    text = json.dumps(value, default=str)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
