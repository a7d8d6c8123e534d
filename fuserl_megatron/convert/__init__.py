"""Hugging Face <-> Megatron: one name table, pure layout functions in both directions, streaming file access.

Called, it is `library.convert`.
"""

from fuserl_megatron.util.callable_room import make_callable

make_callable(__name__)
