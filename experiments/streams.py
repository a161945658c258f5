"""How many tokens a second do requests get that share steps, beside transformers' manager, and what
do the first token and the draws cost?

Usage: python experiments/streams.py DIRECTORY [streams=1,4,16] [prompt=48] [new=32] [rounds=3]
       [compile=block]

DIRECTORY is a quantized demo model. Contenders answer the same held-out texts greedily and take
turns; a figure is the median over the rounds of new tokens per second of the process, prompts
included. `manager` is transformers' continuous batching over the dense model in bfloat16, `static`
its `generate` of one batch over the lowered model, `rounded` what `qlab serve` runs by default
(activations and head as int8), and `block` or `model` the same with steps that were compiled before
the first round.

`first`: processor seconds to the first token of a prompt of 512 tokens through the engine, beside
the bare forward pass. `draws`: what a setting of sampling adds to a step of all streams, eager
(`rounded`) or compiled, as a share of it. Times are processor seconds of one thread. Writes
results/streams.json.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from rich import print
from rich.table import Table
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import qlab
from qlab.demo.build import demo_text
from qlab.files.record import versions
from qlab.generation.drawing import draw
from qlab.generation.sampling import Drawing, Sampling
from qlab.lowering.devices import device_label

RESULT = Path(__file__).parent / "results" / "streams.json"
OPTIONS = {"streams": "1,4,16", "prompt": "48", "new": "32", "rounds": "3", "compile": "block"}
DRAWS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 0.7, "top_k": 50},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "top_p, warm": {"temperature": 1.0, "top_p": 0.95},
    "min_p": {"temperature": 0.7, "min_p": 0.05},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "logprobs": {"temperature": 0, "logprobs": 5},
}
LONG = 512


def of_engine(pipe, new):
    """prompts -> nothing: all of them answered by an engine."""

    def run(prompts):
        for prompt in prompts:
            pipe.engine.submit(prompt, Sampling(temperature=0, max_tokens=new))
        pipe.engine.run()

    return run


def of_manager(model, new):
    """The same by transformers' continuous batching."""
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=2)
    room = ContinuousBatchingConfig(
        num_blocks=64, max_batch_tokens=4096, page_size=64, allow_block_sharing=False
    )

    def run(prompts):
        model.generate_batch(
            prompts,
            generation_config=config,
            continuous_batching_config=room,
            progress_bar=False,
        )

    return run


def of_static(model, new):
    """The same by `generate` of one batch."""

    def run(prompts):
        model.generate(
            torch.tensor(prompts), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )

    return run


class Texts:
    """Windows of held-out text, none of them twice, so that no cache knows them."""

    def __init__(self, model):
        windows = qlab.first_windows(model, [demo_text("heldout")], length=LONG, count=64)
        self._ids, self._next = windows.ids.flatten().tolist(), 0

    def take(self, count, length):
        """The ids of the next windows; from the beginning again where they end."""
        if self._next + count * length > len(self._ids):
            self._next = 0
        first, self._next = self._next, self._next + count * length
        return [self._ids[first + i * length : first + (i + 1) * length] for i in range(count)]


def seconds_of(run, *arguments):
    """Processor seconds of a call."""
    started = time.process_time()
    run(*arguments)
    return time.process_time() - started


def throughput(contenders, options, texts):
    """Contender -> streams -> new tokens per second."""
    new, rounds = int(options["new"]), int(options["rounds"])
    rates = {name: {} for name in contenders}
    for streams in map(int, options["streams"].split(",")):
        taken = {name: [] for name in contenders}
        for turn in range(rounds + 1):
            prompts = texts.take(streams, int(options["prompt"]))
            for name, run in contenders.items():
                seconds = seconds_of(run, prompts)
                taken[name] += [seconds] if turn else []
        for name, values in taken.items():
            rates[name][streams] = streams * new / median(values)
        print(streams, {name: round(rate[streams], 1) for name, rate in rates.items()}, flush=True)
    return rates


def first_token(pipe, texts, rounds):
    """Seconds to the first token of a long prompt, and of the bare forward pass, in turns."""
    model, taken = pipe.engine.model, {"engine": [], "forward": []}
    answer = of_engine(pipe, 1)
    for turn in range(rounds + 1):
        prompt = texts.take(1, LONG)
        ids = torch.tensor(prompt)
        seconds = {
            "engine": seconds_of(answer, prompt),
            "forward": seconds_of(lambda ids=ids: model(ids, use_cache=True, logits_to_keep=1)),
        }
        for name, value in seconds.items():
            taken[name] += [value] if turn else []
    return {name: median(values) for name, values in taken.items()}


def draws(pipe, streams, texts, rounds):
    """Seconds of a greedy step of all streams, of its draw, and of draws by other settings of the
    same logits."""
    prompts = texts.take(streams, 48)
    logits = pipe.engine.model(torch.tensor(prompts), logits_to_keep=1).logits[:, -1]
    new = max(8, 4 * rounds)
    for prompt in prompts:
        pipe.engine.submit(prompt, Sampling(temperature=0, max_tokens=new))
    steps = []
    while not pipe.engine.is_idle:
        steps.append(seconds_of(pipe.engine.step))
    seconds = {"step": median(steps[2:-1])}
    for name, fields in {"greedy": {"temperature": 0}, **DRAWS}.items():
        sampling = Sampling(**fields)
        rows = [
            Drawing(sampling=sampling, prompt=prompt, new=prompt, seed=seed)
            for seed, prompt in enumerate(prompts)
        ]
        seconds[name] = median(seconds_of(draw, logits, rows) for _ in range(4 * rounds))
    return seconds


@torch.no_grad()
def main(directory, *given):
    options = OPTIONS | dict(option.split("=") for option in given)
    torch.set_num_threads(1)
    rows, rounds = max(map(int, options["streams"].split(","))), int(options["rounds"])
    long = {"rows": rows, "max_length": LONG + 16}
    plain = qlab.pipeline(directory, **long)
    rounded = qlab.pipeline(directory, activations="int8", head="int8-g32", **long)
    source = qlab.open("demo")
    dense = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.bfloat16).eval()
    dense.set_attn_implementation("sdpa")
    new, texts = int(options["new"]), Texts(source)
    contenders = {
        "manager": of_manager(dense, new),
        "static": of_static(qlab.lower(directory), new),
        "plain": of_engine(plain, new),
        "rounded": of_engine(rounded, new),
    }
    pipes = {"rounded": rounded}
    for mode in filter(None, options["compile"].split(",")):
        pipe = qlab.pipeline(
            directory, activations="int8", head="int8-g32", compile=mode, rows=rows, max_length=256
        )
        pipe.engine.compiled.wait()
        print(mode, pipe.stats(), flush=True)
        contenders[mode], pipes[mode] = of_engine(pipe, new), pipe
    rates = throughput(contenders, options, texts)
    record = {
        "directory": Path(directory).name,
        "options": options,
        "tokens a second": rates,
        "first": first_token(rounded, texts, rounds),
        "draws": {name: draws(pipe, rows, texts, rounds) for name, pipe in pipes.items()},
        "device": device_label(torch.device("cpu")),
        "versions": versions(),
    }
    table = Table("contender", *(f"{streams} streams" for streams in rates["manager"]))
    for name, of_streams in rates.items():
        ratios = [f"{v:.1f} ({v / rates['manager'][s]:.2f})" for s, v in of_streams.items()]
        table.add_row(name, *ratios)
    table.caption = "new tokens per processor second (beside the manager)"
    print(table)
    print("first token:", record["first"])
    for name, of_step in record["draws"].items():
        shares = {draw: f"{100 * s / of_step['step']:.1f} %" for draw, s in of_step.items()}
        print(f"draws in {name} steps:", shares)
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
