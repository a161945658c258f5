"""A server of a tiny model in a thread, for clients on a socket."""

import contextlib
import socket
import threading
import time
from functools import partial

import httpx
import torch
import uvicorn

import qlab
from qlab.serving.app import Server, Settings, application
from qlab.serving.facts import facts_of
from qlab.serving.worker import Worker

PATIENCE = 300.0  # seconds: a machine that does other things is no fault of the server
get, post = partial(httpx.get, timeout=PATIENCE), partial(httpx.post, timeout=PATIENCE)


@contextlib.contextmanager
def served(directory, queue_tokens=100_000, keys=(), timeout=None, **listening):
    """A server over a directory; its `url` is where it is. listening: more of uvicorn's."""
    pipe = qlab.pipeline(directory, dtype=torch.float32, rows=4)
    facts = facts_of(pipe, "float32")
    settings = Settings(name="tiny", facts=facts, keys=keys, timeout=timeout)
    server, listener = Server(Worker(pipe, queue_tokens), settings), socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    config = uvicorn.Config(application(server), port=port, log_level="error", **listening)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, args=([listener],))
    thread.start()
    while not running.started:
        time.sleep(0.02)
    server.url = f"{'https' if listening else 'http'}://127.0.0.1:{port}"
    try:
        yield server
    finally:
        running.should_exit = True
        thread.join()


def idle(server, seconds=PATIENCE):
    """Whether nothing is computed any more, and all pages are back."""
    engine, end = server.worker.pipe.engine, time.monotonic() + seconds
    while (server.worker.answers or not engine.is_idle) and time.monotonic() < end:
        time.sleep(0.02)
    return engine.is_idle and engine.pages.available == engine.pages.count
