"""qlab replaces what it wrote and nobody changed, and nothing else: refused at the door, before any
work."""

import pytest
from model_folders import contents, prose, refused, rewrite

import qlab
import qlab.cli
from qlab.directories.model_free import quantize_files
from qlab.files import place as places

INT4, INT8 = (qlab.rtn(qlab.parse_spec(name)) for name in ("int4-g16", "int8-g16"))


ADDED = {
    "thesis.tex, which qlab did not write": lambda q: (q / "thesis.tex").write_text(
        "years of work"
    ),
    "notes/day.md, which qlab did not write": lambda q: (
        (q / "notes").mkdir() or (q / "notes" / "day.md").write_text("mine")
    ),
    "the folder notes, which qlab did not make": lambda q: (q / "notes").mkdir(),
    ".git, which qlab did not write": lambda q: (q / ".git").symlink_to(q.parent),
    "tokenizer.json, which was changed": lambda q: (q / "tokenizer.json").write_text("{}"),
    "config.json, which was changed": lambda q: rewrite(
        q / "config.json", lambda c: c.update(mine=1)
    ),
    "qlab.json, which was changed": lambda q: rewrite(
        q / "qlab.json", lambda r: r["sites"].popitem()
    ),
    "model-00001-of-00003.safetensors, which was changed": lambda q: (
        q / "model-00001-of-00003.safetensors"
    ).write_bytes(bytes((q / "model-00001-of-00003.safetensors").stat().st_size)),
    "without a record of its files": lambda q: rewrite(q / "qlab.json", lambda r: r.pop("written")),
    "and 8 more, which qlab did not write": lambda q: (q / "qlab.json").unlink(),
}


@pytest.mark.parametrize("words", ADDED)
def test_what_others_added_or_changed_is_not_replaced(words, model, former):
    ADDED[words](former)
    before = contents(former)
    refused(
        lambda: qlab.quantize(model, INT4, None, former, overwrite=True),
        words,
        "choose another output directory",
    )
    refused(lambda: quantize_files(model, INT4, former, overwrite=True), words)
    assert contents(former) == before and [path.name for path in former.parent.iterdir()] == [
        "former"
    ]


def test_what_somebody_took_away_is_nothing_to_lose(model, former):
    (former / "tokenizer.json").unlink()
    qlab.quantize(model, INT4, None, former, overwrite=True)
    assert (former / "tokenizer.json").is_file()


def test_an_empty_folder_is_a_place(model, tmp_path):
    (tmp_path / "here").mkdir()
    assert qlab.quantize(model, INT8, None, tmp_path / "here").path == tmp_path / "here"


def test_what_is_put_into_the_former_output_during_the_run_stays(model, former, monkeypatch):
    real = places.foreign
    from qlab.files import workplace

    def late(folder, contents=True):
        reason = real(folder, contents)
        if contents:  # after all has been looked at and before it is moved
            (former / "thesis.tex").write_text("years of work")
        return reason

    monkeypatch.setattr(workplace, "foreign", late)
    refused(
        lambda: qlab.quantize(model, INT4, None, former, overwrite=True),
        "thesis.tex, which qlab did not write",
        "--resume",
    )
    assert (former / "thesis.tex").read_text() == "years of work"


def test_places_that_are_no_folder_of_their_own(model, former, tmp_path, monkeypatch, no_work):
    (tmp_path / "link").symlink_to(former)
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    (tmp_path / "users" / "me").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "users" / "me"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "current" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "current" / "inner")
    before = contents(tmp_path)
    for out, words in {
        "": "is no name",
        ".": "is the current folder",
        "..": "the current folder or one around it",
        "/": "or one around it",
        "../inner": "is the current folder or holds it",
        "../../current": "is the current folder or holds it",
        str(tmp_path / "link"): "is a link to",
        str(tmp_path / "lost/"): "is a link to",
        str(tmp_path / "file"): "is a file",
        str(tmp_path / "a.partial"): "ends in .partial",
        str(tmp_path / "A.Partial"): "ends in .partial",
        "a\0b": "is no name",
        "~": "is your home or holds it",
        str(tmp_path / "users"): "is your home or holds it",
        "~nobody-of-this-name/q": "is in nobody's home",
        str(tmp_path / "file" / "q"): "cannot be created",
    }.items():
        for overwrite in (False, True):
            refused(
                lambda out=out, overwrite=overwrite: qlab.quantize(
                    model, INT4, None, out, overwrite=overwrite
                ),
                words,
            )
    assert contents(tmp_path) == before


def test_a_mount_point_is_refused_before_any_work(model, former, tmp_path, monkeypatch, no_work):
    table = tmp_path / "mountinfo"
    monkeypatch.setattr(places, "MOUNTS", table)
    (tmp_path / "a b").mkdir()
    for mount, out in (
        (former, former),
        (former / "inner", former),
        (tmp_path / "a b", tmp_path / "a b"),
    ):
        text = str(mount).replace(" ", "\\040")
        table.write_text(f"36 35 98:0 / {text} rw,noatime master:1 - ext4 /dev/root rw\n")
        refused(
            lambda out=out: qlab.quantize(model, INT4, None, out, overwrite=True),
            f"{mount} is a mount point",
            "inside it",
        )


def test_an_output_never_holds_what_the_run_reads(model, former, tmp_path, no_work):
    text = former / "README.md"
    text.write_text(prose(4096))
    rewrite(
        former / "qlab.json",
        lambda r: r["written"].update({"README.md": "as if qlab had written it"}),
    )
    data = qlab.tokens(model, [text], samples=2, length=32)
    gptq = qlab.gptq(qlab.parse_spec("int4-g16"))
    for out in (former, tmp_path / "link" / ".." / "former"):
        (tmp_path / "link").exists() or (tmp_path / "link").symlink_to(former)
        refused(
            lambda out=out: qlab.quantize(model, gptq, data, out, overwrite=True),
            "holds what the run reads",
            "README.md",
        )
    (tmp_path / "texts.partial").mkdir()
    (tmp_path / "texts.partial" / "t.txt").write_text(prose(4096))
    data = qlab.tokens(model, tmp_path / "texts.partial" / "t.txt", samples=2, length=32)
    refused(
        lambda: qlab.quantize(model, gptq, data, tmp_path / "texts"),
        "texts.partial holds what the run reads",
    )


def test_weights_behind_links_are_what_the_run_reads_too(former, saved, tmp_path, no_work):
    (tmp_path / "model").mkdir()
    for path in former.iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    refused(
        lambda: qlab.convert(tmp_path / "model", "compressed-tensors", former, overwrite=True),
        "holds what the run reads",
    )


@pytest.mark.parametrize(
    "names",
    [
        ["..", "a"],
        [".."],
        ["."],
        ["", "a"],
        ["a/b"],
        ["a\\b"],
        ["a\0"],
        ["a", "A"],
        ["ﬁ", "fi"],
        ["a", "a.partial"],
        ["A.PARTIAL"],
        ["a/"],
        [1],
    ],
)
def test_names_of_recipes_that_are_no_folders_of_their_own(names, model, tmp_path, no_work):
    (tmp_path / "runs").mkdir()
    (tmp_path / "notes.md").write_text("mine")
    recipes = dict.fromkeys(names, INT4)
    refused(
        lambda: qlab.compare(model, recipes, None, tmp_path / "runs", overwrite=True), "the recipe"
    )
    assert contents(tmp_path) == {"notes.md": b"mine"}
