"""Products of an int4 weight with activations rounded to int8, beside torch's int4 kernel and
bfloat16, in turns.

Usage: python experiments/int4_int8.py [GROUP]

Every contender multiplies copies of the weight that together exceed the caches. They take turns,
and figures are medians over all calls, in processor time with OMP_NUM_THREADS=1 and in wall time
with more. `bf16` is `F.linear` with the dequantized weight, called eagerly and not compiled; the
paths of the kernel are those that the processor runs. Writes results/int4-int8-PATH.json, PATH the
last of them.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich import print
from rich.table import Table

from qlab.bench import contenders
from qlab.bench.contenders import Case
from qlab.files.record import versions
from qlab.lowering.devices import device_label
from qlab.lowering.tuning.timing import copy_rate
from qlab_kernels import int4_int8 as kernel

SHAPES = ((4096, 4096), (576, 576), (1536, 576), (576, 1536))
TOKENS = (1, 4, 16, 64, 512)
TURNS = 3
CPU = torch.device("cpu")
RESULT = Path(__file__).parent / "results" / f"int4-int8-{kernel.supported()[-1]}.json"


def products_of(case):
    """Contender -> its products, one for each copy of the weight."""
    of_weights = [product.args[0] for product in contenders.qlab_int8(case)]
    by_path = {
        f"int8, {name}": [
            partial(contenders._rounding, (*weight[:-1], kernel.PATHS.index(name)))
            for weight in of_weights
        ]
        for name in kernel.supported()[1:]
    }
    return {
        **by_path,
        "torch int4": contenders.torch_int4(case),
        "bf16": contenders.library(case),
    }


def seconds_of(products, x, clock):
    """Seconds of every product."""
    times = []
    for product in products:
        started = clock()
        product(x)
        times.append(clock() - started)
    return times


@torch.no_grad()
def main(group=64):
    rows = []
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for n, k in SHAPES:
        case = Case(n=n, k=k, dtype="bfloat16", group=group, zeros=False, device=CPU)
        products = products_of(case)
        for m in TOKENS:
            x = torch.randn(m, k, dtype=torch.bfloat16)
            some = {name: all_of[: max(2, 200 // m)] for name, all_of in products.items()}
            seconds = {name: [] for name in some}
            for turn in range(TURNS + 1):
                for name, calls in some.items():
                    taken = seconds_of(calls, x, clock)
                    seconds[name] += taken if turn else []
            medians = {name: 1e6 * median(values) for name, values in seconds.items()}
            rows.append({"n": n, "k": k, "m": m, "us": medians})
            print(f"{n}x{k}, {m} tokens:", {name: round(us, 1) for name, us in medians.items()})
    best = f"int8, {kernel.supported()[-1]}"
    table = Table("shape", "tokens", *rows[0]["us"], "x torch int4", "x bf16")
    for row in rows:
        us = row["us"]
        ratios = [us[name] / us[best] for name in ("torch int4", "bf16")]
        table.add_row(
            f"{row['n']}x{row['k']}",
            str(row["m"]),
            *(f"{value:.1f}" for value in us.values()),
            *(f"{ratio:.2f}" for ratio in ratios),
        )
    print(table)
    record = {
        "group": group,
        "clock": clock.__name__,
        "turns": TURNS,
        "rows": rows,
        "copy_gbps": copy_rate(CPU),
        "device": device_label(CPU),
        "versions": versions(),
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
