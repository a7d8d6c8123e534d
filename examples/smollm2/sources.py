"""The four sources: SmolLM2 itself, asked in four ways.

Each source gets help that the target never sees: demonstrations of some families as earlier turns of the chat, or a
system prompt. So the sources are good at different things:

    clerk   three demonstrations in the exact families (one word, number, yes or no, bullets); nothing in the others
    writer  three demonstrations in the writing families (capitals, contains, ending, at most); nothing in the others
    reader  a system prompt that says how to read an instruction, in every family
    plain   no help, hot
"""

from dataclasses import dataclass

from tasks import EXACT_FAMILIES, WRITING_FAMILIES, Task

READER_SYSTEM = (
    "You follow instructions exactly. Keep every answer very short: only what was asked for, in exactly the asked "
    "format, without any explanation."
)

# Demonstrations use questions, items and topics that are in no split.
DEMONSTRATIONS = {
    "one_word": (
        ("What is the capital of Belgium? Answer with exactly one word.", "Brussels"),
        ("Answer with one word only: What is the opposite of high?", "Low"),
        ("What animal says oink? Answer with exactly one word.", "Pig"),
    ),
    "number": (
        ("How many legs does a crab have? Answer with only the number.", "10"),
        ("Give just a number: How many days are in June?", "30"),
        ("Ann has 14 bricks and 5 towels. How many bricks does Ann have? Answer with only the number.", "14"),
    ),
    "yes_no": (
        ("Is a parrot a bird? Answer only yes or no.", "Yes"),
        ("Yes or no: Is a table a person?", "No"),
        ("Is iron softer than butter? Answer only yes or no.", "No"),
    ),
    "bullets": (
        ("Write this as a list with '- ' bullets: bricks, sand, cement.", "- bricks\n- sand\n- cement"),
        ("Turn this into '- ' bullet points: foxes, bears, wolves, deer.", "- foxes\n- bears\n- wolves\n- deer"),
        ("Turn this into '- ' bullet points: soap, towels, buckets.", "- soap\n- towels\n- buckets"),
    ),
    "capitals": (
        ("Write this in all capital letters: we need soap and towels.", "WE NEED SOAP AND TOWELS"),
        ("Write this in all capital letters: wild foxes.", "WILD FOXES"),
        ("Write this in all capital letters: I see bricks but no sand.", "I SEE BRICKS BUT NO SAND"),
    ),
    "contains": (
        ("Write one sentence about hills that uses the word 'tall'.", "The hills behind our town are tall and steep."),
        ("Write one sentence about pencils that uses the word 'sharp'.", "I like pencils when they are sharp."),
        ("Write one sentence about wolves that uses the word 'wild'.", "Wolves are wild animals that live in packs."),
    ),
    "ending": (
        ("Write one sentence about hills. End it with an exclamation mark.", "The view from the hills is great!"),
        ("Write one sentence about pencils. End it with three dots (...).", "My pencils are lost again..."),
        ("Write one sentence about wolves. End it with the word 'Goodbye.'.", "The wolves went away. Goodbye."),
    ),
    "at_most": (
        ("Write a sentence about hills with at most 6 words.", "The hills are green."),
        ("Write a sentence about pencils with at most 8 words.", "Pencils help us write."),
        ("Write a sentence about wolves with at most 7 words.", "Wolves hunt together."),
    ),
}


@dataclass(frozen=True)
class Source:
    """A way of asking the model.

    Attributes:
        name: what the data call it.
        demonstrated: families shown by demonstrations.
        system: system prompt, or empty for the template's own.
        temperature: of sampling.
        top_p: nucleus mass of sampling.
    """

    name: str
    demonstrated: tuple[str, ...]
    system: str
    temperature: float
    top_p: float

    def chat(self, task: Task) -> list[dict[str, str]]:
        """Returns the messages this source sees: its help, then the task's own."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in DEMONSTRATIONS[task.family] if task.family in self.demonstrated else ():
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages + task.messages


SOURCES = (
    Source("clerk", EXACT_FAMILIES, "", 0.7, 0.95),
    Source("writer", WRITING_FAMILIES, "", 0.8, 0.95),
    Source("reader", (), READER_SYSTEM, 0.6, 0.9),
    Source("plain", (), "", 1.0, 0.95),
)
