"""kill -9 while `qlab serve` starts, or compiles behind its first answer: the directory stays as it
is, and the next start answers as if there had been none."""

import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
from killing import KILLED, finish, start
from model_folders import contents

import qlab
from faults import Case, Trial
from faults.runs import INT4, model_in, quietly

ASKED = {"prompt": "word1 word2 word3", "max_tokens": 8, "temperature": 0}
PATIENCE = 120.0  # seconds that a start may take on a loaded machine
COMPILING = 20.0  # seconds behind the first answer in which a block of this size is compiled


def serving(model: Path, home: Path, port: int, compiled: str = "none") -> Callable[[], None]:
    """The command that serves a model, with caches in a home of its own."""

    def run() -> None:
        from qlab.__main__ import main

        os.environ |= {"QLAB_HOME": str(home), "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor")}
        options = ["--port", str(port), "--dtype", "float32", "--compile", compiled]
        sys.argv = ["qlab", "serve", str(model), *options]
        try:
            main()
        except SystemExit as end:
            os._exit(int(end.code or 0))

    return quietly(run)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


def reply(pid: int, port: int) -> str:
    """What the server says to a prompt, once it answers."""
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            said = httpx.post(f"{url}/v1/completions", json=ASKED, timeout=PATIENCE)
            return str(said.raise_for_status().json()["choices"][0]["text"])
        except httpx.ConnectError:
            assert os.waitpid(pid, os.WNOHANG)[0] == 0, "the server ended while it started"
            time.sleep(0.02)
    raise AssertionError(f"no answer in {PATIENCE} s")


def answered(model: Path, home: Path, compiled: str = "none") -> tuple[str, float]:
    """What a server that is started now says, which then ends as it is asked to, and the seconds
    until it said it."""
    began, port = time.monotonic(), free_port()
    pid = start(serving(model, home, port, compiled))
    text = reply(pid, port)
    seconds = time.monotonic() - began
    os.kill(pid, signal.SIGTERM)
    code = finish(pid)
    assert code == 0, f"a server that was asked to end ended with {code}"
    return text, seconds


def trial(
    model: Path,
    whole: dict[str, bytes],
    expected: tuple[str, float],
    draw: random.Random,
    folder: Path,
) -> str:
    """Starts that are killed, and one that is not; some in a new home, for which kernels are
    built, and some with what they compile."""
    killed, (text, seconds) = 0, expected
    home = folder / "home" if draw.random() < 0.2 else model.parent / "home"
    compiled = draw.choice(("none", "block"))
    for _ in range(draw.randint(1, 3)):
        port = free_port()
        pid = start(serving(model, home, port, compiled))
        if compiled == "none":
            time.sleep(draw.uniform(0, seconds))
        else:
            reply(pid, port)
            time.sleep(draw.uniform(0, COMPILING))
        os.kill(pid, signal.SIGKILL)
        killed += finish(pid) == KILLED
    assert contents(model) == whole, "the directory that is served changed"
    said, _ = answered(model, home, compiled)
    assert said == text, f"behind {killed} kills the server says {said!r} in the place of {text!r}"
    return f"the same answer after kill {killed}, --compile {compiled}"


def make(folder: Path) -> Trial:
    """A model, and what it answers."""
    model = folder / "served"
    qlab.quantize(qlab.open(model_in(folder)), qlab.rtn(INT4), None, model)
    answered(model, folder / "home")  # builds the kernels
    return partial(trial, model, contents(model), answered(model, folder / "home"))


# The suite has no seconds for building kernels.
CASES = (Case(name="kill -9 of serve's start", make=make, bounded=0),)
