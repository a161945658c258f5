"""Directories whose tokenizer, chat template or sampling is changed at random."""

import json
import random
from pathlib import Path
from typing import Any

from bytewise import model_folder
from model_folders import add_tokenizer

from faults import Trial
from faults.fuzz_configs import linked, written
from faults.inputs import READ, REFUSED, case, refusal
from faults.mutations import OUTSIDE, TEXTS, changed_json, changed_text, text_of
from qlab.data.calibration import tokenizer_of
from qlab.data.tokenizing import token_ids
from qlab.files.checkpoint import open_checkpoint
from qlab.generation.text import GrowingText

FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
# Keys that tokenizers' configurations may have, and that libraries read.
MORE: dict[str, Any] = {
    "tokenizer_file": OUTSIDE[0],
    "vocab_file": OUTSIDE[1],
    "merges_file": OUTSIDE[1],
    "auto_map": {"AutoTokenizer": ["code.Words", "../outside--code.Words"]},
    "tokenizer_class": "NoSuchTokenizer",
    "added_tokens_decoder": {"99999999999": {"content": "<x>", "special": True}},
    "name_or_path": OUTSIDE[2],
    "fast_tokenizer_files": ["tokenizer.4.0.0.json", "../outside/tokenizer.4.0.0.json"],
    "model_max_length": 10**400,
    "extra_special_tokens": {"x": 7},
    "chat_template": {"default": 7},
}
TEMPLATES = [
    "{% include '../outside/config.json' %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages | tojson }}",
    "{{ range(10 ** 12) | list }}",
    "{{ 'x' * 10 ** 12 }}",
    "{{ raise_exception('no') }}",
    "{{ messages[5].content }}",
    "{% for",
    "{{ 9 ** 9 ** 9 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
]
MESSAGES = [{"role": "user", "content": "word1 word2"}]


def tokenizers(shared: Path) -> Trial:
    """Words, merges, special tokens and templates."""
    sources = [model_folder(shared / "bytes", words=None), model_folder(shared / "words")]
    add_tokenizer(sources[1])
    (shared / "outside").mkdir()
    (shared / "outside" / "tokenizer.4.0.0.json").write_text("{}")

    def one(draw: random.Random, folder: Path) -> str:
        source = draw.choice(sources)
        folder = linked(source, folder / "model")
        name = draw.choice(FILES)
        there = source / name
        value = json.loads(there.read_bytes()) if there.exists() else {"bos_token": "<s>"}
        if name == "tokenizer_config.json" and draw.random() < 0.5:
            key = draw.choice([*MORE])
            value[key] = MORE[key]
        if draw.random() < 0.2:
            text = draw.choice(TEMPLATES)
            template = (source / "chat_template.jinja").read_text()
            text = text if draw.random() < 0.7 else changed_text(draw, template, TEMPLATES)
            written(folder, "chat_template.jinja", text.encode(errors="surrogatepass"))
        else:
            written(folder, name, text_of(draw, changed_json(draw, value)))
        words, refused = refusal(lambda: tokenizer_of(open_checkpoint(folder)))
        if refused:
            return REFUSED
        text = draw.choice(["word1 word2 é", draw.choice(TEXTS)])
        said = [refusal(lambda: list(token_ids(words, [[text]])))[1]]
        said.append(refusal(lambda: _grown(words, draw))[1])
        return REFUSED if any(said) else READ

    return one


def _grown(words: Any, draw: random.Random) -> str:
    """The text of drawn tokens."""
    text = GrowingText(words, stop=["word3"])
    return "".join([*(text.add(draw.randrange(128)) for _ in range(8)), text.end()])


CASES = [case("tokenizers", tokenizers)]
