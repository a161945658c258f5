"""What the engine behind `qlab run`, `chat` and `serve` costs, one figure for each word.

Usage: OMP_NUM_THREADS=1 python experiments/serving.py compile DIRECTORY [ROWS,...]

compile: what compiling one bucket of rows costs, for the blocks and for the whole step, in a
process that finds nothing made before and in one that finds what the first made; and tokens per
second of decode steps at contexts from 48 tokens on, eager, by blocks and whole, in turns.

DIRECTORY is a quantized model. Times are processor time, of child processes too where something is
compiled. Each word writes its part of results/serving.json.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from rich import print
from rich.table import Table

import qlab
from qlab.files.record import versions
from qlab.generation import compiled
from qlab.generation.engine import Engine
from qlab.generation.sampling import Sampling
from qlab.lowering.devices import device_label

RESULT = Path(__file__).parent / "results" / "serving.json"
FOLDER = "QLAB_CACHE_DIR"
ROWS, MODES, PROMPT, STEPS, TURNS = (1, 16), ("none", "block", "model"), 48, 16, 5


def cpu_seconds():
    """Of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def engine_of(model, mode, rows):
    """An engine that has compiled the bucket of all its rows, and what that took."""
    compiled.buckets = lambda rows: (rows,)
    started, begun = cpu_seconds(), time.perf_counter()
    engine = Engine(model, rows=rows, max_length=1024, reuse=False, compile=mode)
    engine.compiled.wait()
    stats = engine.compiled.stats()
    assert mode == "none" or (stats["ready"] == (rows,) and not stats["eager"]), stats
    return engine, {
        "cpu_seconds": cpu_seconds() - started,
        "wall_seconds": time.perf_counter() - begun,
        "graphs": stats["graphs"],
    }


def one_start(directory, mode, rows):
    """In a process of its own: what compiling took, as JSON."""
    model = qlab.lower(directory, dtype=torch.bfloat16)
    sys.stdout.write(json.dumps(engine_of(model, mode, int(rows))[1]))


def first_start(directory, mode, rows, folder):
    """What compiling took in a process that finds nothing in a folder."""
    command = [sys.executable, __file__, "one-start", directory, mode, str(rows)]
    run = subprocess.run(command, env={**os.environ, FOLDER: folder}, check=True, stdout=-1)
    return json.loads(run.stdout.splitlines()[-1])


def decode_rate(engine, rows):
    """Tokens per processor second of steps in which every row has a token."""
    sampling = Sampling(temperature=0, max_tokens=STEPS + 8)
    prompts = [[1 + row, *range(100, 99 + PROMPT)] for row in range(rows)]
    requests = [engine.submit(prompt, sampling) for prompt in prompts]
    while not all(request.drawn for request in requests):
        engine.step()
    started = time.process_time()
    for _ in range(STEPS):
        engine.step()
    seconds = time.process_time() - started
    engine.run()
    return rows * STEPS / seconds


def figures_of(directory, rows, top):
    """Of one number of rows. The second start, in this process, finds what the first one made."""
    first = {mode: first_start(directory, mode, rows, f"{top}/{mode}") for mode in MODES[1:]}
    print(rows, first)
    model, engines, second = qlab.lower(directory, dtype=torch.bfloat16), {}, {}
    for mode in MODES:
        os.environ[FOLDER] = f"{top}/{mode}"
        engines[mode], second[mode] = engine_of(model, mode, rows)
    print(rows, second)
    turns = {mode: [] for mode in MODES}
    for turn in range(TURNS + 1):
        for mode, engine in engines.items():
            rate = decode_rate(engine, rows)
            turns[mode] += [rate] if turn else []  # the first one warms up
    recompiles = [engine.compiled.stats()["recompiles"] for engine in engines.values()]
    assert not any(recompiles), recompiles
    return {
        "model": Path(directory).name,
        "prompt": PROMPT,
        "steps": STEPS,
        "first_start": first,
        "second_start": {mode: second[mode] for mode in MODES[1:]},
        "tokens_per_cpu_second": turns,
    }


def compile_figures(directory, several="1,16"):
    """Number of rows -> seconds of compiling, and tokens per second with and without."""
    table, figures = Table("rows", *MODES), {}
    for rows in map(int, several.split(",")):
        with tempfile.TemporaryDirectory() as top:
            figures[str(rows)] = of = figures_of(directory, rows, top)
        medians = [median(of["tokens_per_cpu_second"][mode]) for mode in MODES]
        table.add_row(str(rows), *[f"{rate:.1f}" for rate in medians])
    print(table)
    return figures


FIGURES = {"compile": compile_figures}


def main(word, *arguments):
    if word == "one-start":
        one_start(*arguments)
        return
    about = {
        "device": device_label(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    figures = {name: {**of, **about} for name, of in FIGURES[word](*arguments).items()}
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    record[word] = {**record.get(word, {}), **figures}
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
