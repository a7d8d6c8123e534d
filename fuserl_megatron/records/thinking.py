"""Blocks of reasoning: the marks around them, and a generation prompt that ends with one."""

THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
"""(opening mark, closing mark)."""
THINKING_MARKS = frozenset(mark for pair in THINKING for mark in pair)


def thinking_at_end(text: str) -> tuple[str, str, str] | None:
    """The block of reasoning a text ends with: (state, opening mark, closing mark); the state is open or closed."""
    bare = text.rstrip()
    for opening, closing in THINKING:
        if bare.endswith(closing):
            return "closed", opening, closing
        if bare.endswith(opening):
            return "open", opening, closing
    return None


def split_block(text: str) -> tuple[str, str]:
    """A text in two: what stands in front of the block of reasoning it ends with, and the block (empty without one)."""
    block = thinking_at_end(text)
    if block is None:
        return text, ""
    _, opening, closing = block
    start = text.rfind(opening if opening in text else closing)
    return text[:start], text[start:]


def without_opening(response: str, prompt: str, opening: str) -> str:
    """A response without the opening mark, and the white space behind it, that the prompt already ends with."""
    bare = response.lstrip()
    if not bare.startswith(opening):
        return response
    return bare[len(opening) :].removeprefix(prompt[len(prompt.rstrip()) :])
