"""What HTTP costs beside the model: processor time of the server's process for a streamed token.

Usage: python experiments/server_cost.py DIRECTORY [RESULTS.json]

DIRECTORY has a tokenizer. A stub stands in the place of the engine: every step gives each request
one token, and takes as long as a step of a small model. All else is the server's own: the thread
that computes, text from tokens, events, sockets. Clients are another process. Steps that nobody
reads cost what the stub costs itself, which is part of the figure.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import torch
import uvicorn

import qlab
from qlab.data.calibration import tokenizer_of
from qlab.files.record import versions
from qlab.generation.pipeline import Pipeline
from qlab.generation.request import LENGTH, Request
from qlab.generation.sampling import Drawn, Sampling
from qlab.lowering.devices import device_label
from qlab.serving.app import Server, Settings, application
from qlab.serving.worker import Worker

STREAMS, TOKENS, ROUNDS, STEP = (1, 16), 200, 3, 0.01


class Stub:
    """An engine whose tokens are ordinary words, one a step for each request."""

    vocabulary, longest = 2**30, 2**20
    pages = SimpleNamespace(available=1, count=1)
    compiled = SimpleNamespace(graphs=0, recompiles=0)

    def __init__(self):
        self.requests = []

    def submit(self, prompt, sampling, told, word=None, inputs=None):
        request = Request(number=0, prompt=prompt, sampling=sampling, seed=0, told=told)
        self.requests = [*self.requests, request]
        return request

    @property
    def is_idle(self):
        return not self.requests

    def step(self):
        time.sleep(STEP)
        for request in self.requests:
            request.accept(Drawn(token=500 + len(request.drawn) % 300))
            if request.is_cancelled:
                request.finish = LENGTH
        self.requests = [r for r in self.requests if r.finish is None]


class Stubbed(Pipeline):
    """A pipeline of the stub."""

    def __init__(self, directory):
        self.tokenizer, self.defaults = tokenizer_of(qlab.open(directory)), Sampling()
        self.engine, self.images = Stub(), None


def serve(directory, port):
    """The server's process."""
    server = Server(Worker(Stubbed(directory), 2**30), Settings(name="stub", facts={}))
    uvicorn.run(application(server), port=port, log_level="error")


@contextlib.contextmanager
def served(directory, port=8471):
    """The process of a server that is ready."""
    command = [sys.executable, __file__, "serve", str(directory), str(port)]
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/ready").is_success:
                    break
            time.sleep(0.2)
        else:
            raise SystemExit(f"the server ended with {process.returncode}")
        yield psutil.Process(process.pid), f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


async def read(url, streams):
    """How many tokens so many clients read."""
    body = {"prompt": [5] * 40, "max_tokens": TOKENS, "stream": True, "ignore_eos": True}

    async def one(client):
        async with client.stream("POST", f"{url}/v1/completions", json=body) as stream:
            return sum([line.startswith("data: {") async for line in stream.aiter_lines()])

    async with httpx.AsyncClient(timeout=600) as client:
        return sum(await asyncio.gather(*[one(client) for _ in range(streams)]))


def stream_cost(directory):
    """Number of streams -> microseconds of the server's processor time for a streamed token, one
    figure a round; the first round is not counted."""
    costs = {streams: [] for streams in STREAMS}
    with served(directory) as (process, url):
        for number in range(ROUNDS + 1):
            for streams in STREAMS:
                before = process.cpu_times()
                tokens = asyncio.run(read(url, streams))
                after = process.cpu_times()
                if tokens != streams * TOKENS:
                    raise SystemExit(f"{tokens} tokens of {streams * TOKENS} came")
                spent = after.user + after.system - before.user - before.system
                if number:
                    costs[streams].append(1e6 * spent / tokens)
    return costs


def main():
    directory, *out = sys.argv[1:]
    costs = stream_cost(directory)
    record = {
        "microseconds": {str(n): [round(cost, 1) for cost in each] for n, each in costs.items()},
        "tokens": TOKENS,
        "step_seconds": STEP,
        "device": device_label(torch.device("cpu")),
        "versions": versions(),
    }
    print(json.dumps(record, indent=1))
    for path in out:
        Path(path).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        main()
