"""The pages that a reader sees: README, CONTRIBUTING and docs, as blocks of commands
and snippets, and the folder that they are read in."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from gguf_files import KINDS, write
from model_folders import prose
from task_folders import write_tasks

import qlab.cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+) ?(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; line: that of its fence."""

    page: Path
    line: int
    language: str
    mark: str
    text: str


def blocks(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: m.start()].count("\n") + 1, *m.groups()) for m in FENCE.finditer(text)
    ]


def commands(block):
    """The words of every command."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


def commands_of(page):
    return [
        words for block in blocks(page) if block.language == "bash" for words in commands(block)
    ]


[QUANTIZE] = [
    words for words in commands_of(ROOT / "README.md") if words[:2] == ["qlab", "quantize"]
]
MADE = QUANTIZE[-1]


def fill(folder, saved):
    """The demo, texts, models, and what README's `qlab quantize` makes of them."""
    (folder / "text").mkdir()
    for name, family in {"model": "llama", "mixtral": "mixtral"}.items():
        (folder / name).symlink_to(saved(family, torch.bfloat16, max_position_embeddings=2048))
    write(folder / "model.gguf", {"attn_q": KINDS.Q4_0})
    write_tasks(folder / "my-tasks")
    windows = {
        "text/calibration.jsonl": 33,
        "text/heldout.jsonl": 3,
        "my.jsonl": 33,
        "held-out.jsonl": 3,
    }
    for seed, (name, count) in enumerate(windows.items()):
        (folder / name).write_text(
            json.dumps({"title": "", "text": prose(512 * count, seed)}) + "\n"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("QLAB_DEMO", str(folder))
        qlab.cli.app(QUANTIZE[1:], standalone_mode=False)
        shared = ["--method", "rtn", "--out", "shared-int4", "--jobs", "jobs"]
        qlab.cli.app(["quantize", "demo", *shared], standalone_mode=False)
