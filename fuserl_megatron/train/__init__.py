"""The training run: the loop read top to bottom, its schedules and its log. Called, it is `library.train`."""

from fuserl_megatron.util.callable_room import make_callable

make_callable(__name__)
