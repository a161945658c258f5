"""Does a model of the shapes of Llama 3 70B run on a small machine, and do the methods without data
run as fast as files can be copied?

Usage: python experiments/large.py blocks FOLDER [blocks=2] [samples=2] [length=512]
           [spec=int4-g128] [sweeps=1] [rtn=NAME,NAME] [layers=80] [hidden=8192]
           [intermediate=28672] [vocabulary=128256]
       python experiments/large.py speed FOLDER [gigabytes=1] [turns=3] [spec=int4-g128]
       python experiments/large.py experts FOLDER [blocks=1] [rounded=6] [samples=2]
           [length=128] [spec=int4-g128] [method=gptq] [layers=48] [hidden=2048] [intermediate=768]
           [experts=128] [vocabulary=151936] [shard=5e9]

`blocks` writes a model to FOLDER whose first blocks hold random numbers, and whose others are holes
in sparse files: they take no room and no run reads them. The weights whose names end as `rtn` says
are rounded to nearest, and all others are solved by GPTQ, with `sweeps` of coordinate descent (0:
as in its paper). It plans the whole, runs the first blocks by `qlab.rehearse` with states and sums
of statistics in FOLDER, and compares the predicted peak with the measured one. The model is written
by a process of its own, since a process keeps some of the memory that it wrote with.

`speed` writes a model of blocks of hidden size 2048 and takes turns: a plain copy of its files,
synced as every run of qlab syncs what it writes, a copy that is not synced, RTN (`quantize`), and
RTN from the files alone (`quantize_files`). A figure is bytes of the model over the seconds of a
turn; the ratio is the median over turns of that to the synced copy's. The model was just written or
read, so it lies in the page cache where memory allows: all contenders read from there, and what a
disk takes to read is in none of them.

`experts` writes a mixture as `blocks` does, in the names and the shards in which transformers saves
one, in shards of 5 GB. It rounds the first blocks (`rounded`; those behind the first `blocks` are
holes) to nearest, and solves the first `blocks` by a method, with states in memory and in FOLDER.
It counts how often each shard is opened from the beginning of a run to its end.
Writes results/large-<part>.json.
"""

import json
import os
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from rich import print
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

import qlab
from qlab.files.directory import METADATA
from qlab.files.record import versions
from qlab.lowering.devices import device_label

RESULTS = Path(__file__).parent / "results"
BLOCKS = {
    "blocks": "2",
    "samples": "2",
    "length": "512",
    "spec": "int4-g128",
    "sweeps": "1",
    "rtn": "",
    "layers": "80",
    "hidden": "8192",
    "intermediate": "28672",
    "vocabulary": "128256",
}
EXPERTS = {
    "blocks": "1",
    "rounded": "6",
    "samples": "2",
    "length": "128",
    "spec": "int4-g128",
    "method": "gptq",
    "layers": "48",
    "hidden": "2048",
    "intermediate": "768",
    "experts": "128",
    "vocabulary": "151936",
    "shard": "5e9",
}
SPEED = {"gigabytes": "1", "turns": "3", "spec": "int4-g128"}
ROWS, HEAD = 512, 128  # rows that are drawn at once; channels of a head
KNOWN = 4096  # tokens whose embeddings hold numbers


def shapes_of(layer, hidden, intermediate):
    """Tensor -> its shape, of one block; an eighth of the heads are keys' and values'."""
    attention = {"q": hidden, "k": hidden // 8, "v": hidden // 8, "o": hidden}
    linears = {f"self_attn.{name}_proj": (o, hidden) for name, o in attention.items()}
    linears |= {f"mlp.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
    linears["mlp.down_proj"] = (hidden, intermediate)
    norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    return {f"model.layers.{layer}.{n}.weight": s for n, s in {**norms, **linears}.items()}


def write_sparsely(path, shapes, filled):
    """A safetensors file in bfloat16. filled: name -> how many rows hold numbers; the rest is a
    hole, which reads as zeros."""
    header, at = {METADATA: {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + at)
        for number, (name, shape) in enumerate(shapes.items()):
            file.seek(start + header[name]["data_offsets"][0])
            drawn = torch.Generator().manual_seed(number)
            for first in range(0, min(shape[0], filled[name]), ROWS):
                size = (min(ROWS, shape[0] - first), *shape[1:])
                x = torch.randn(size, generator=drawn, dtype=torch.float32) * shape[-1] ** -0.5
                x = x if len(shape) == 2 else torch.ones(size, dtype=torch.float32)
                file.write(x.bfloat16().view(torch.uint8).numpy().data)


def write_model(folder, layers, hidden, intermediate, vocabulary, real):
    """A model directory of which `real` blocks hold numbers."""
    folder.mkdir(parents=True)
    AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=hidden // HEAD // 8,
        vocab_size=vocabulary,
        dtype="bfloat16",
    ).save_pretrained(folder)
    for layer in range(layers):
        shapes = shapes_of(layer, hidden, intermediate)
        rows = dict.fromkeys(shapes, max(hidden, intermediate) if layer < real else 0)
        write_sparsely(folder / f"block-{layer}.safetensors", shapes, rows)
    around = {
        "lm_head.weight": (vocabulary, hidden),
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    write_sparsely(folder / "around.safetensors", around, dict.fromkeys(around, KNOWN))


def apart(write, *arguments):
    """Write a model in a process of its own, whose memory is gone when the run begins."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(write, *arguments).result()


def blocks(folder, options):
    """The plan of the whole and the first blocks, run."""
    sizes = [int(options[n]) for n in ("layers", "hidden", "intermediate", "vocabulary")]
    apart(write_model, folder / "model", *sizes, int(options["blocks"]))
    model = qlab.open(folder / "model")
    shape = int(options["samples"]), int(options["length"])
    known = min(KNOWN, sizes[-1])
    ids = torch.randint(0, known, shape, generator=torch.Generator().manual_seed(0))
    rounded = {f"*{end}": qlab.rtn(options["spec"]) for end in options["rtn"].split(",") if end}
    solved = qlab.gptq(options["spec"], sweeps=int(options["sweeps"]))
    recipe = qlab.rules({**rounded, "*": solved})
    rehearsal = qlab.rehearse(
        model,
        recipe,
        qlab.from_ids(model, ids),
        blocks=int(options["blocks"]),
        offload=folder / "states",
    )
    print(rehearsal.plan, rehearsal)
    predicted = rehearsal.plan.peak_bytes / rehearsal.peak_rss_bytes
    print(f"predicted peak / measured peak: {predicted:.2f}")
    plan = {k: v for k, v in rehearsal.plan.json().items() if k in ("memory", "peak_bytes")}
    return {**rehearsal.json(), "plan": plan, "predicted / measured": predicted}


def copied(model, out, synced):
    """The files of a model, copied."""
    out.mkdir()
    for file in model.iterdir():
        shutil.copyfile(file, out / file.name)
        if synced:
            with (out / file.name).open("rb") as copy:
                os.fsync(copy.fileno())


def speed(folder, options):
    """Bytes of the model a second, of every contender in turns."""
    hidden, intermediate = 2048, 8192
    in_block = 2 * sum(torch.Size(s).numel() for s in shapes_of(0, hidden, intermediate).values())
    layers = max(1, round(float(options["gigabytes"]) * 1e9 / in_block))
    write_model(folder / "model", layers, hidden, intermediate, 512, real=layers)
    model, out = folder / "model", folder / "out"
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    recipe = qlab.rtn(options["spec"])
    contenders = {
        "copy, synced": lambda: copied(model, out, synced=True),
        "copy": lambda: copied(model, out, synced=False),
        "quantize": lambda: qlab.quantize(qlab.open(model), recipe, None, out),
        "quantize_files": lambda: qlab.quantize_files(model, recipe, out),
    }
    rates = {name: [] for name in contenders}
    processor = {name: [] for name in contenders}
    qlab.quantize_files(model, recipe, out)  # what is imported and compiled once
    for _ in range(int(options["turns"])):
        for name, run in contenders.items():
            shutil.rmtree(out)
            started, used = time.perf_counter(), time.process_time()
            run()
            rates[name].append(size / (time.perf_counter() - started))
            processor[name].append(time.process_time() - used)
    ratios = {
        name: median(mine / copy for mine, copy in zip(each, rates["copy, synced"]))
        for name, each in rates.items()
    }
    table = Table("contender", "MB/s", "of the synced copy", "processor seconds")
    for name, each in rates.items():
        figures = f"{median(each) / 1e6:.0f}", f"{ratios[name]:.2f}", f"{min(processor[name]):.1f}"
        table.add_row(name, *figures)
    print(table)
    return {"bytes": size, "rates": rates, "of the synced copy": ratios, "processor": processor}


def write_mixture(folder, options):
    """The directory of a mixture of experts, of which the first blocks hold numbers, in shards of
    at most so many bytes."""
    folder.mkdir(parents=True)
    heads = int(options["hidden"]) // 64
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=int(options["hidden"]),
        intermediate_size=3 * int(options["hidden"]),
        moe_intermediate_size=int(options["intermediate"]),
        num_hidden_layers=int(options["layers"]),
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 8),
        head_dim=HEAD,
        num_experts=int(options["experts"]),
        num_experts_per_tok=8,
        vocab_size=int(options["vocabulary"]),
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    saved = revert_weight_conversion(model, model.state_dict())
    shards, room = [], 0
    for name, tensor in saved.items():
        size = tensor.numel() * tensor.itemsize
        if size > room:
            shards.append({})
            room = float(options["shard"])
        shards[-1][name] = tuple(tensor.shape)
        room -= size
    real = [f"model.layers.{layer}." for layer in range(int(options["blocks"]))]
    index = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        rows = {
            name: shape[0] if name.startswith(tuple(real)) or ".layers." not in name else 0
            for name, shape in shapes.items()
        }
        rows |= {name: KNOWN for name in ("lm_head.weight", "model.embed_tokens.weight")}
        write_sparsely(folder / file, dict(sorted(shapes.items())), rows)
        index |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def openings_of(folder):
    """A live count of how often each shard is opened, by its name; of the whole process."""
    count = Counter()

    def noting(event, arguments):
        if event == "open" and str(arguments[0]).startswith(f"{folder}{os.sep}model-"):
            count[Path(arguments[0]).name] += 1

    sys.addaudithook(noting)
    return count


def experts(folder, options):
    """The plan of the whole and the first blocks of a mixture, rounded and solved."""
    apart(write_mixture, folder / "model", options)
    model = qlab.open(folder / "model")
    shape = int(options["samples"]), int(options["length"])
    known = min(KNOWN, int(options["vocabulary"]))
    ids = torch.randint(0, known, shape, generator=torch.Generator().manual_seed(0))
    spec, solved = options["spec"], int(options["blocks"])
    method = qlab.METHODS[options["method"]](spec), qlab.from_ids(model, ids)
    contenders = {
        "rtn": (qlab.rtn(spec), None, int(options["rounded"]), None),
        options["method"]: (*method, solved, None),
        f"{options['method']}, offload": (*method, solved, folder / "states"),
    }
    count, runs = openings_of(folder / "model"), {}
    for name, (recipe, data, blocks, offload) in contenders.items():
        count.clear()
        rehearsal = qlab.rehearse(model, recipe, data, blocks=blocks, offload=offload)
        print(rehearsal.plan, rehearsal, dict(count))
        plan = {k: v for k, v in rehearsal.plan.json().items() if k in ("memory", "peak_bytes")}
        read = {
            stored.file.name
            for tensor, stored in model.stored.items()
            if any(f".layers.{layer}." in tensor for layer in range(blocks))
        }
        runs[name] = {
            **rehearsal.json(),
            "plan": plan,
            "predicted / measured": rehearsal.plan.peak_bytes / rehearsal.peak_rss_bytes,
            "shards of its blocks": sorted(read),
            "openings": {file.name: count[file.name] for file in sorted(set(model.files.values()))},
        }
    return {"runs": runs}


PARTS = {"blocks": (blocks, BLOCKS), "speed": (speed, SPEED), "experts": (experts, EXPERTS)}


def main() -> None:
    part, folder, *rest = sys.argv[1:]
    run, known = PARTS[part]
    options = known | dict(word.split("=", 1) for word in rest)
    if options.keys() != known.keys():
        raise SystemExit(f"options are {', '.join(known)}")
    found = run(Path(folder), options)
    result = {
        "options": options,
        "processor": device_label(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **found,
    }
    (RESULTS / f"large-{part}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
