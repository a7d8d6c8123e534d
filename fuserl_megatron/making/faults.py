"""What is wrong when a request brings no answer, and what follows from it.

permanent   this request will never work (too long, a setting the server refuses): a failure at once
stop        no request will work (the key is refused): the run stops
busy        the server has too much to do: all wait a while, no attempt is used up
lost        nobody listens there: all wait until somebody does, no attempt is used up
broken      an error, a half reply, no reply in time: tried again later, unless the server turns out to be dead
"""

import email.utils
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LONGEST_WAIT = 600.0
"""Seconds: more is not believed of a Retry-After."""
TRY_AGAIN = (408, 409, 425)
"""Statuses below 500 that say nothing against the request itself."""


@dataclass(frozen=True)
class Fault:
    """Why a request brought no answer."""

    kind: Literal["permanent", "stop", "busy", "lost", "broken"]
    reason: str
    """One line with the server's own words."""
    name: str
    """Under which such faults are counted, such as prompt_too_long or http_500."""
    wait: float | None = None
    """Seconds the server asks to be left alone."""
    status: int | None = None


def fault_of_status(status: int, headers: Mapping[str, str], body: bytes) -> Fault:
    """What a status other than 200 means."""
    text = message_of(body)
    reason, name = f"HTTP {status}: {text}", f"http_{status}"
    if status in (401, 403):
        return Fault("stop", reason, name, status=status)
    if status in (429, 503):
        return Fault("busy", reason, name, retry_after(headers.get("Retry-After")), status)
    if status >= 500 or status in TRY_AGAIN:
        return Fault("broken", reason, name, status=status)
    too_long = re.search(r"context length|too long|input_tokens|max_model_len|longer than the m|exceed.*token", text)
    return Fault("permanent", reason, "prompt_too_long" if too_long else name, status=status)


def fault_of_error(error: Exception) -> Fault:
    """What an exception of the client means."""
    import aiohttp

    if isinstance(error, aiohttp.ClientConnectorError):
        return Fault("lost", f"no connection ({error.os_error or error})", "no_connection")
    if isinstance(error, TimeoutError):
        return Fault("broken", "no answer in time", "timeout")
    if isinstance(error, ValueError):
        return Fault("broken", f"the reply is not JSON ({error})", "not_json")
    return Fault("broken", f"the connection broke ({str(error) or type(error).__name__})", "connection")


def retry_after(text: str | None) -> float | None:
    """Seconds of a Retry-After header, which gives seconds or a date; None without one that can be read."""
    if not text:
        return None
    try:
        wait = float(text)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(wait, 0.0), LONGEST_WAIT) if wait == wait else None


def message_of(body: bytes) -> str:
    """The server's own words, on one line: the message of an OpenAI error, or the beginning of whatever it is."""
    text = body[:4000].decode("utf-8", "replace")
    try:
        found = json.loads(body)
        found = found.get("error", found) if isinstance(found, dict) else found
        found = (found.get("message") or found.get("detail") or found) if isinstance(found, dict) else found
        text = found if isinstance(found, str) else json.dumps(found)
    except ValueError:
        text = re.sub(r"<[^>]*>", " ", text)
    return " ".join(text.split())[:300] or "(no text)"


def alike(reason: str) -> str:
    """The reason without what differs from request to request."""
    return re.sub(r"\d+|[0-9a-f-]{16,}", "#", reason)[:120]
