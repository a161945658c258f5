"""Runs inside an environment with auto-round: MODEL OUT. Rounds a model to every format of WAYS,
each into OUT/<name>, loads it again, and writes OUT/<name>.dense.safetensors: what its kernels make
of every weight, as the image of the unit matrix."""

import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

WAYS = {
    "auto_gptq": dict(format="auto_round", bits=4, sym=True),
    "three_bits": dict(format="auto_round", bits=3, sym=True),
    "gptqmodel": dict(format="auto_round:gptqmodel", bits=4, sym=False),
    "auto_awq": dict(format="auto_round:auto_awq", bits=4, sym=False),
    "mixed": dict(
        format="auto_round",
        bits=4,
        sym=True,
        layer_config={"o_proj": {"bits": 8}, "down_proj": {"bits": 16}},
    ),
}


def main(source, out):
    tokenizer = AutoTokenizer.from_pretrained(source)
    for name, settings in WAYS.items():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
        form = settings.pop("format")
        widths = {
            path: m.in_features
            for path, m in model.named_modules()
            if isinstance(m, torch.nn.Linear)
        }
        AutoRound(
            model,
            tokenizer,
            group_size=32,
            iters=0,
            disable_opt_rtn=True,
            device_map="cpu",
            **settings,
        ).quantize_and_save(f"{out}/{name}.made", format=form)
        [folder] = Path(f"{out}/{name}.made").iterdir()  # it names a folder after the model
        folder.rename(f"{out}/{name}")
        loaded = AutoModelForCausalLM.from_pretrained(
            f"{out}/{name}", device_map="cpu", dtype=torch.float16
        )
        modules = {path: m for path, m in loaded.named_modules() if hasattr(m, "qweight")}
        with torch.no_grad():
            images = {
                path: m(torch.eye(widths[path], dtype=torch.float16)).T
                for path, m in modules.items()
            }
        save_file(
            {path: W.half().contiguous() for path, W in images.items()},
            f"{out}/{name}.dense.safetensors",
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
