"""Ports for servers that tests start in processes of their own."""

import os
import socket
from itertools import count

FIRST, LAST = 20_000, 32_000  # below those that a system gives to whoever asks for any
_tried = count()


def free_port() -> int:
    """A port on which nobody listens, and which no other process of the tests is given."""
    while True:
        port = FIRST + (101 * os.getpid() + next(_tried)) % (LAST - FIRST)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
