"""TCP ports of this machine for ranks that meet here."""

import socket


def reserved_port() -> socket.socket:
    """A socket bound to a free TCP port that it keeps for the one who will listen there, as long as it is open.

    Ranks take seconds to import torch; a port that was merely free before may be another program's by then. Both sides
    set SO_REUSEADDR (torch's store does), and a socket that does not listen does not stand in the way.
    """
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", 0))
    return probe


def free_port() -> int:
    """A TCP port nobody listens on just now."""
    with reserved_port() as probe:
        return probe.getsockname()[1]
