"""Jobs whose memory is measured, each in a fork of one process that has imported everything."""

import json
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import torch.export._trace  # what is imported at the first export
import transformers.models.llama.modeling_llama  # noqa: F401  of most models

from qlab.algebra.bind import Bind
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import chain, rules
from qlab.data.calibration import from_ids
from qlab.driver.plan import plan
from qlab.driver.quantize import quantize
from qlab.files.checkpoint import open_checkpoint
from qlab.methods import METHODS
from qlab.methods.allocate import allocate
from qlab.methods.auto_round import auto_round
from qlab.methods.guidedquant import guidedquant
from qlab.methods.kl_tune import kl_tune
from qlab.methods.qat import qat
from qlab.methods.qat_end_to_end import qat_end_to_end
from qlab.methods.rtn import rtn
from qlab.methods.spinquant import spinquant

INT4 = parse_spec("int4-g64")


def gptq_in_attention(spec):
    return rules({"*.self_attn.*": METHODS["gptq"](spec), "*": rtn(spec)})


def learned(method):
    """A method that learns, for two steps: it holds as much in each."""
    return lambda spec: method(spec, steps=2, windows=2)


def behind_rtn(step):
    """A step that learns over the whole model, for two steps."""
    return lambda spec: chain(rtn(spec), step(steps=2))


RECIPES = {
    "guidedquant": guidedquant,
    "kl_tune": behind_rtn(kl_tune),
    "qat_end_to_end": behind_rtn(qat_end_to_end),
    "spinquant": lambda spec: chain(spinquant(spec, steps=1), rtn(spec)),
    "allocate": lambda spec: allocate([rtn(parse_spec("int3-g64")), rtn(spec)], 4),
    "gptq in attention": gptq_in_attention,
    "gptq without sweeps": lambda spec: METHODS["gptq"](spec, sweeps=0),
    "auto_round": learned(auto_round),
    "qat": learned(qat),
}


def peak(
    path: str,
    out: str,
    method: str,
    samples: int,
    length: int,
    memory: int | None,
    offload: str | None = None,
) -> dict:
    """What a job held at most, and what its plan said."""
    model = open_checkpoint(path)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (samples, length), generator=generator)
    data = None if method == "rtn" else from_ids(model, ids)
    recipe = (METHODS | RECIPES)[method](INT4)
    measures = any(isinstance(stage, Bind) for stage in recipe)
    before = plan(model, recipe, data, memory=memory) if measures else None
    result = quantize(model, recipe, data, out, memory=memory, offload=offload)
    planned = before or result.plan  # what a bind measured is known to the plan of what it returned
    return {
        "peak": result.peak_rss_bytes,
        "predicted": planned.peak_bytes,
        "held": dict(planned.memory),
        "at_once": result.plan.experts_at_once,
    }


def within(path: str, out: str, limit: int | None) -> dict:
    """How many sites a job rounds that may take no more memory than this, and what it leaves."""
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    result = quantize(open_checkpoint(path), rtn(INT4), None, out)
    return {"data": psutil.Process().memory_info().data, "sites": len(result.sites)}


JOBS: dict[str, Callable[..., dict]] = {"peak": peak, "within": within}


def serve() -> None:
    """Read a job a line and answer each with a line."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                print(json.dumps(JOBS[name](**arguments)), flush=True)
                os._exit(0)
            except BaseException:
                print(json.dumps({"error": traceback.format_exc()}), flush=True)
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"error": f"the job ended with status {status}"}), flush=True)


@contextmanager
def server(**environment: str):
    """run(name, **arguments) -> what that job measured."""
    command = [sys.executable, "-W", "error:::qlab", __file__]
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(name: str, **arguments: object) -> dict:
        texts = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in arguments.items()
        }
        process.stdin.write(json.dumps([name, texts]) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    yield run
    process.stdin.close()
    process.wait()


if __name__ == "__main__":
    serve()
