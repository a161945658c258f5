"""Engines over tiny models, and what `generate` says of the same prompts."""

import torch
from families import tiny
from transformers import GenerationConfig

from qlab.generation.engine import Engine
from qlab.generation.sampling import Sampling

PROMPTS = [
    [5, 9, 17, 33, 21, 8, 90, 14, 3, 77, 60],
    [7, 8, 9],
    [100, 50, 25, 12, 6, 3, 99, 98, 97, 96, 95, 94, 93, 92, 91, 90, 89, 88, 87],
    [64],
]
END = 127
GREEDY = Sampling(temperature=0, max_tokens=12, stop_ids=(END,))


def generated(model, prompt, count=12):
    """The new tokens of `generate`, alone and greedy."""
    how = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=END)
    out = model.generate(torch.tensor([prompt]), generation_config=how)
    return out[0, len(prompt) :].tolist()


def reference(family):
    """A tiny model in fp32, and the tokens of all prompts."""
    model = tiny(family).float().eval()
    return model, [generated(model, prompt) for prompt in PROMPTS]


def asked(engine, prompts=PROMPTS, sampling=GREEDY):
    """All prompts through an engine; the requests when they have ended."""
    requests = [engine.submit(prompt, sampling) for prompt in prompts]
    engine.run()
    return requests


def small(model, **settings):
    """An engine of few and small pages."""
    return Engine(model, **({"page": 4, "pages": 64, "rows": 4, "chunk": 5} | settings))
