"""Samples and files of records for tests of scoring."""

import json


def sample(prompt, response, source="a", **fields):
    """A sample as it comes from a file."""
    from fuserl_megatron.making.answers import as_answer

    record = {"prompt": prompt, "source": source, "response": response, **fields}
    return as_answer(("test", 1), record)


def write_records(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)
