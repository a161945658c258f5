"""Two ranks of one thread each against one process of two threads: GPTQ of the demo, on two cores.

    python experiments/ranks.py FOLDER [ROUNDS] [SAMPLES] [BLOCKS]

BLOCKS takes the first blocks of the demo alone. Both take turns, each in processes of their own,
whose import of torch is not counted. Wall seconds are those that `qlab.quantize` says; processor
seconds are those of all processes. Results go into experiments/results/ranks.json.
"""

import json
import os
import platform
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import qlab
from qlab.demo.build import demo_text
from qlab.process.processor import here

RESULTS = Path(__file__).parent / "results" / "ranks.json"
LENGTH, SPEC = 512, "int4-g64"


def cut(folder: Path, blocks: int) -> Path:
    """The demo with its first blocks alone."""
    folder.mkdir(parents=True)
    source = qlab.open("demo").path
    for path in source.glob("*.json"):
        if not path.name.endswith(".index.json"):
            shutil.copy(path, folder)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": blocks}))
    kept = {}
    for path in source.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            number = re.search(r"layers\.(\d+)\.", name)
            if number is None or int(number[1]) < blocks:
                kept[name] = tensor
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def recipe_of(model, samples: int):
    """What is run: GPTQ on so many samples, without any rtn."""
    if not samples:
        return qlab.rtn(SPEC), None
    data = qlab.tokens(model, [demo_text("calibration")], samples=samples, length=LENGTH)
    return qlab.gptq(SPEC), data


def work(folder: str, out: str, samples: int) -> None:
    """One rank, or one process: quantize, by rtn where there are no samples, and print what it
    took."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    model = qlab.open(folder)
    recipe, data = recipe_of(model, samples)
    before = resource.getrusage(resource.RUSAGE_SELF)
    result = qlab.quantize(model, recipe, data, out)
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({**result.json(), "sites": len(result.sites), "processor_seconds": used}))
    if dist.is_initialized():
        dist.destroy_process_group()


def run(model: Path, out: Path, ranks: int, threads: int, samples: int) -> dict[str, float]:
    """What a run of so many ranks took."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, "work", str(model), str(out), str(samples)]
    processes = [
        subprocess.Popen(
            command,
            env=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    return {
        "seconds": max(one["seconds"] for one in said),
        "processor_seconds": sum(one["processor_seconds"] for one in said),
        "peak_rss_bytes": max(one["peak_rss_bytes"] for one in said),
        "sent_bytes_per_block": said[0]["sent_bytes_per_block"],
    }


def main(folder: str, rounds: int = 3, samples: int = 16, blocks: int = 30) -> None:
    model = cut(Path(folder) / "model", blocks)
    found: dict[str, list[dict[str, float]]] = {"one_process": [], "two_ranks": []}
    for number in range(rounds):
        for name, ranks, threads in (("one_process", 1, 2), ("two_ranks", 2, 1)):
            out = Path(folder) / f"{name}-{number}"
            found[name].append(run(model, out, ranks, threads, samples))
            print(name, found[name][-1], flush=True)
    middle = {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    speed = middle["one_process"]["seconds"] / middle["two_ranks"]["seconds"]
    RESULTS.write_text(
        json.dumps(
            {
                "question": "two ranks of a thread each against one process of two threads",
                "model": f"demo, {blocks} blocks",
                "method": f"gptq {SPEC}, {samples} x {LENGTH} tokens",
                "processor": str(here()),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "when": time.strftime("%Y-%m-%d"),
                "load_before_and_after": os.getloadavg(),
                "speed_of_two_ranks": speed,
                "medians": middle,
                "runs": found,
            },
            indent=1,
        )
        + "\n"
    )
    print(f"two ranks have {speed:.2f} of the speed of one process")


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main(sys.argv[1], *map(int, sys.argv[2:]))
