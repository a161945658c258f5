"""README and docs: what they say is run. Every command and every snippet, as it stands, on tiny
models under the pages' names.

A page is read from the top, in a folder of its own that holds what README's `qlab quantize` writes.
The word behind a block's language says what cannot be run here, of which the options are parsed;
`refused` blocks end in the errors of the `text` block that follows, where `...` stands for
anything.
"""

import json
import re
import shutil
import tomllib
from importlib.util import find_spec

import pytest
from families import FAMILIES, MIXTURES, OTHERS, UNLIKE, VISION, WRITTEN_OUT
from pages import MADE, PAGES, QUANTIZE, ROOT, blocks, commands, commands_of
from typer.core import TyperCommand
from typer.main import get_command

import qlab.cli
from qlab.bench.__main__ import app as bench_app
from qlab.bench.__main__ import main as bench
from qlab.errors import QlabError
from qlab.methods import METHODS
from qlab.methods.names import STEPS

LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")
UNRUN = ("gpu", "minutes", "network", "others")  # needs a GPU, minutes, a network, other libraries
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def program(words):
    """The program of qlab that a command line calls, and its arguments; others have none."""
    if words[0] == "qlab":
        return qlab.cli.main, words[1:]
    if words[:3] == ["python", "-m", "qlab.bench"]:
        return bench, words[3:]
    return None, words


def check_names(words):
    """A command of another program names files and extras that the project has."""
    assert (
        words[0]
        in ("git", "cd", "pip", "python", "pytest", "ruff", "mypy", "sphinx-build", ".ci/run")
        or words[0] == "torchrun"
        or "=" in words[0]
    ), words
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for word in words:
        if extra := re.search(r"\[(\w+)\]$", word):
            assert extra[1] in extras, word
        elif re.search(r"\.(py|txt)$|^(tests|experiments|\.ci)/", word):
            assert (ROOT / word).exists(), word


@pytest.fixture
def here(page, shelf, tmp_path, monkeypatch, request):
    """The folder that a page is read in."""
    monkeypatch.setenv("QLAB_DEMO", str(shelf))
    monkeypatch.setenv("QLAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("QLAB_CACHE_DIR", str(tmp_path / "configs"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("mixtral", "model.gguf", "my.jsonl", "held-out.jsonl"):
        (folder / name).symlink_to(shelf / name)
    if page.stem == "models":
        (folder / "llava").symlink_to(request.getfixturevalue("llava"))
    if "import qlab.hf" in page.read_text(encoding="utf-8"):
        request.getfixturevalue("door")
    if QUANTIZE not in commands_of(page):
        shutil.copytree(shelf / MADE, folder / MADE)
    return folder


def alike(said, quoted):
    """Whether it was said word for word, but for what `...` leaves out."""
    return re.fullmatch(re.escape(quoted).replace(re.escape("..."), ".*"), said)


@pytest.fixture
def run(command, monkeypatch):
    """run(words, mark): a command, or with a mark of UNRUN only its options -> exit code, the last
    line on stderr."""

    def call(words, mark):
        main, arguments = program(words)
        if main is None:
            check_names(words)
            return 0, ""
        with monkeypatch.context() as patch:
            if mark in UNRUN:
                patch.setattr(TyperCommand, "invoke", lambda self, context: None)
            code, _, said = command(main, *arguments)
        return code, said.splitlines()[-1] if said else ""

    return call


def follow(page, run):
    """Do what a page says, from the top."""
    names = {"__name__": page.stem}
    read = blocks(page)
    for block, following in zip(read, [*read[1:], None]):
        where = f"{page.name}:{block.line}"
        expected = following.text.splitlines() if block.mark == "refused" else []
        refusals = []
        if block.language == "bash":
            done = [run(words, block.mark) for words in commands(block)]
            assert {code for code, _ in done} == {2 if expected else 0}, f"{where}: {done}"
            refusals = [said for _, said in done if expected]
        if block.language == "python":
            code = compile("\n" * block.line + block.text, str(page), "exec")
            try:
                exec(code if block.mark not in UNRUN else "", names)
            except QlabError as error:
                refusals = [str(error)]
        assert len(refusals) == len(expected), f"{where}: {refusals}"
        for said, quoted in zip(refusals, expected):
            assert alike(said, quoted), f"{where}: {said!r} is not {quoted!r}"


@each_page
def test_commands_and_snippets_do_what_the_page_says(page, here, run):
    follow(page, run)


LIES = {
    "an option that does not exist": "```bash gpu\nqlab plan demo --out demo-int4\n```\n",
    "a command that does not exist": "```bash minutes\npython -m qlab.bench everything --out x\n```\n",  # noqa: E501
    "a command that is refused": "```bash\nqlab plan nowhere\n```\n",
    "an extra that does not exist": '```bash network\npip install -e ".[cuda]"\n```\n',
    "a script that does not exist": "```bash others\ngit pull && python experiments/nothing.py\n```\n",  # noqa: E501
    "a name that does not exist": "```python\nimport qlab\n\nqlab.quantise\n```\n",
    "no Python": "```python gpu\nqlab.lower(demo\n```\n",
    "a refusal in other words": "```bash refused\nqlab plan nowhere\n```\n```text\nqlab: nowhere to be found\n```\n",  # noqa: E501
    "a refusal that does not come": "```bash refused\nqlab --version\n```\n```text\nqlab: ...\n```\n",  # noqa: E501
    "an error that does not come": "```python refused\nimport qlab\n```\n```text\n...\n```\n",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_page_that_lies_fails(lie, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text(LIES[lie])
    with pytest.raises((AssertionError, AttributeError, SyntaxError)):
        follow(tmp_path / "page.md", run)


@each_page
def test_every_block_is_read(page):
    text, read = page.read_text(encoding="utf-8"), blocks(page)
    assert text.count("```") == 2 * len(read)
    for block, following in zip(read, [*read[1:], None]):
        assert block.language in ("bash", "python", "text") and block.mark in (
            "",
            "refused",
            *UNRUN,
        ), block
        assert (block.mark == "refused") <= (
            following is not None and following.language == "text"
        ), block


def options(command):
    """The options of a command and of those below it."""
    flags = {
        name
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    return flags.union(*map(options, getattr(command, "commands", {}).values()))


@each_page
def test_options_paths_and_names_in_the_text_exist(page):
    text = page.read_text(encoding="utf-8")
    # the second is torchrun's, the third that of `python -m tests.faults`
    others = {"--help", "--nproc-per-node", "--hours"}
    known = options(get_command(qlab.cli.app)) | options(get_command(bench_app)) | others
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) <= known
    paths = re.findall(r"`((?:qlab|tests|experiments|docs|kernels)/[\w/.-]*)", text)
    assert not [path for path in paths if not (ROOT / path).exists()]
    public = set(re.findall(r"\bqlab\.(\w+)", text)) - {"json"}  # qlab.json is a file
    assert not [
        name for name in public if name not in qlab.__all__ and not find_spec(f"qlab.{name}")
    ]


@each_page
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in path:
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), path
            headings = (
                re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                if anchor
                else []
            )
            assert not anchor or anchor in [
                re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings
            ], anchor


def test_every_method_and_step_has_a_paper_and_a_law():
    page = (ROOT / "docs" / "methods.md").read_text()
    table = page.partition("## Papers and laws")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| `")]
    assert all(len(row) == 3 and all(cell.strip() for cell in row) for row in rows)
    named = {name for row in rows for name in re.findall("`([^`]+)`", row[0])}
    assert named == {*METHODS, *STEPS}


def test_the_readme_is_short_and_the_index_names_every_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    site = (ROOT / "docs" / "index.rst").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem == "README" or (
            f"]({page.name})" in index and f"   {page.stem}\n" in site
        ), page


def test_every_public_name_has_a_line_in_the_manual():
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`qlab\.(\w+)`", text)) - {"hf"} == set(qlab.__all__)


def results(name):
    return json.loads((ROOT / "experiments" / "results" / name).read_text(encoding="utf-8"))


def test_the_readmes_table_is_of_the_stored_run():
    table = [
        line
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ][2:]
    stored = {row["name"].lower(): row for row in results("rivals.json")["rows"]}
    for line in table:
        who, change, kl, seconds, peak = (cell.strip(" |") for cell in line.strip("|").split("|"))
        program, *_, method = re.sub(r"[`,]", "", who).lower().split()
        row = stored[f"{program} {method}"]
        low, high = (100 * (ratio - 1) for ratio in row["ratio_ci"])
        assert change == f"{100 * (row['ratio'] - 1):+.1f} % ({low:.1f} to {high:.1f})"
        assert (kl, seconds) == (
            f"{row['kl']:.3f}",
            f"{row['seconds'][0]:.0f}",
        ) and peak == f"{row['peak_rss_bytes'][0] / 2**20:.0f}"
        assert row["version"] in who or row["version"] == "here"


def test_the_readmes_rates_are_of_the_stored_runs():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    rates = {
        row["engine"]: row["decode_tokens_per_s"]
        for row in results("generate-llama-cpp.json")["rows"]
    }
    assert f"generates {rates['qlab compiled, gptq']:.0f} tokens a second" in text
    assert (
        f"llama.cpp generates {rates['llama.cpp']:.0f} " in text
        and f"transformers {rates['bf16 eager, gptq']:.1f} in" in text
    )
    sizes = {
        row["engine"]: row["weight_bytes"] for row in results("generate-int4-g64.json")[0]["rows"]
    }
    assert f"take {sizes['qlab eager'] / sizes['bf16 eager']:.2f} of the memory" in text


def test_models_that_are_named_are_tested():
    families = {**FAMILIES, **MIXTURES, **OTHERS, **WRITTEN_OUT, **UNLIKE, **VISION}
    lists = re.findall(
        r"^- .* such as (.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    lists += re.findall(
        r"^\| .* \| (.*, .*) \|$",
        (ROOT / "docs" / "models.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(lists) == 8 and {name for line in lists for name in line.split(", ")} <= set(
        families
    )


def test_every_module_is_in_the_table_of_files():
    table = (
        (ROOT / "CONTRIBUTING.md")
        .read_text(encoding="utf-8")
        .split("## What is where")[1]
        .split("\n## ")[0]
    )
    named = re.findall(
        r"`([\w/.]+)`",
        "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")),
    )
    assert not [name for name in named if not (ROOT / name).exists()]
    modules = [
        p for p in (ROOT / "qlab").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    ]
    missing = (
        {str(p.relative_to(ROOT)) + "/" * p.is_dir() for p in modules}
        - set(named)
        - {"qlab/__main__.py"}
    )
    assert not missing, f"give {sorted(missing)} a row in CONTRIBUTING's table"
