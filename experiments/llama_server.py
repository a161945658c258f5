"""How many tokens a second does the engine behind `qlab serve` give beside llama.cpp's server, on
the same codes?

Usage: python experiments/llama_server.py FOLDER [streams=1,16] [prompt=48] [new=32] [rounds=3]
       [compile=none,block]

The demo model is rounded to nearest into FOLDER (int4-g32, its head int8-g32) and written as GGUF
(Q4_0, Q8_0). llama.cpp is the wheel xllamacpp, in a process of its own; it rounds activations to
int8, and so does qlab. Both answer the same held-out texts greedily, as many at a time as there are
streams, and take turns. A figure is the median over the rounds of new tokens per second of the
answering process, prompts included, with one thread each. Writes results/llama-server.json.
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

import qlab
from qlab.demo.build import demo_text
from qlab.files.record import versions
from qlab.generation.sampling import Sampling
from qlab.lowering.devices import device_label

RESULT = Path(__file__).parent / "results" / "llama-server.json"
OPTIONS = {"streams": "1,16", "prompt": "48", "new": "32", "rounds": "3", "compile": "none,block"}
# The other side. Reads lines of [prompts, new tokens], and answers with its seconds.
LLAMA = """
import json, sys, time, xllamacpp
from concurrent.futures import ThreadPoolExecutor
path, slots = sys.argv[1], int(sys.argv[2])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, slots * 256, slots, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print(json.dumps(xllamacpp.get_system_info()), flush=True)
for line in sys.stdin:
    prompts, new = json.loads(line)
    asked = [{"prompt": ids, "n_predict": new, "temperature": 0, "ignore_eos": True} for ids in prompts]
    started = time.process_time()
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(server.handle_completions, asked))
    assert all(answer["usage"]["completion_tokens"] == new for answer in answers), answers[0]
    print(json.dumps(time.process_time() - started), flush=True)
"""  # noqa: E501


def written(folder):
    """The directory and its GGUF file."""
    directory, file = folder / "int4-g32", folder / "int4-g32.gguf"
    if not directory.exists():
        head = qlab.outside(qlab.at("lm_head", qlab.rtn("int8-g32")))
        qlab.quantize("demo", qlab.chain(qlab.rtn("int4-g32"), head), None, directory)
    if not file.exists():
        qlab.convert(directory, "gguf", file)
    return directory, file


class Llama:
    """llama.cpp's server in another process."""

    def __init__(self, file, slots):
        command = [sys.executable, "-c", LLAMA, str(file), str(slots)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.build = json.loads(self._process.stdout.readline())

    def seconds(self, prompts, new):
        """Processor seconds of answering."""
        self._process.stdin.write(json.dumps([prompts, new]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Engine:
    """qlab's engine in this process."""

    def __init__(self, directory, rows, mode):
        how = {"activations": "int8", "compile": mode, "max_length": 256}
        self.pipe = qlab.pipeline(directory, rows=rows, **how)
        self.pipe.engine.compiled.wait()

    def seconds(self, prompts, new):
        """The same."""
        started = time.process_time()
        for prompt in prompts:
            self.pipe.engine.submit(prompt, Sampling(temperature=0, max_tokens=new))
        self.pipe.engine.run()
        return time.process_time() - started


def main(folder, *given):
    options = OPTIONS | dict(option.split("=") for option in given)
    prompt, new, rounds = (int(options[name]) for name in ("prompt", "new", "rounds"))
    torch.set_num_threads(1)
    directory, file = written(Path(folder))
    streams = [int(count) for count in options["streams"].split(",")]
    llama = Llama(file, max(streams))
    sides = {"llama.cpp": llama}
    modes = options["compile"].split(",")
    sides |= {mode: Engine(directory, max(streams), mode) for mode in modes}
    windows = qlab.first_windows(qlab.open("demo"), [demo_text("heldout")], length=512, count=64)
    texts = iter(windows.ids.flatten().unfold(0, prompt, prompt).tolist())
    rates = {}
    for count in streams:
        taken = {name: [] for name in sides}
        for turn in range(rounds + 1):
            prompts = [next(texts) for _ in range(count)]
            for name, side in sides.items():
                seconds = side.seconds(prompts, new)
                taken[name] += [seconds] if turn else []
        rates[count] = {name: count * new / median(values) for name, values in taken.items()}
        print(count, {name: round(rate, 1) for name, rate in rates[count].items()}, flush=True)
    table = Table("streams", *sides)
    for count, of_count in rates.items():
        llamas = of_count["llama.cpp"]
        table.add_row(str(count), *(f"{r:.1f} ({r / llamas:.2f})" for r in of_count.values()))
    table.caption = "new tokens per processor second (beside llama.cpp)"
    print(table)
    record = {
        "options": options,
        "tokens a second": rates,
        "llama.cpp": llama.build,
        "device": device_label(torch.device("cpu")),
        "versions": versions(),
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
