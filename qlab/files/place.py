"""Where an output may go: a new or empty folder, or one that qlab wrote, apart from all that the
run reads."""

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from qlab.errors import QlabError, Unwritable
from qlab.files.ownership import foreign, read_sealed

PARTIAL = ".partial"  # ends the name of the folder in which an output is built
WORK = ".work"  # in that folder: how far the run came
MOUNTS = Path("/proc/self/mountinfo")
# Names of pipes and terminals, and names that mean another file each time.
STREAMS = re.compile(r"-|/dev/(std(in|out|err)|fd/.*)|/proc/.*")


def place(out: str | Path, model: Path, files: Iterable[Path] = ()) -> Path:
    """The folder that `out` names, with all links before its name followed.

    model: what the output is made from, a folder or a file; files: what else the run reads. Refuses
    what is no folder of its own (the current one and those around it, a link, a mount point, a
    file), and a folder that holds what the run reads.
    """
    folder = _named(out)
    if os.path.islink(folder):
        raise QlabError(
            f"{folder} is a link to {os.readlink(folder)}; name the output directory itself"
        )
    for reads, role in [(model, "the model"), *((file, "what the run reads,") for file in files)]:
        _refuse_around(folder, reads, role)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise QlabError(f"{folder} is a file; choose another output directory")
    if _is_within(_current(), folder):
        raise QlabError(
            f"the output directory {folder} is the current folder or holds it; choose another one"
        )
    if _is_within(Path(os.path.expanduser("~")), folder):
        raise QlabError(
            f"the output directory {folder} is your home or holds it; give the path of a folder "
            "of its own"
        )
    mounted = _mount_in(folder)
    if mounted:
        raise QlabError(
            f"{mounted} is a mount point, which cannot be replaced; choose a folder inside it as "
            "the output directory"
        )
    return folder


def places(
    out: str | Path, names: Sequence[str], model: Path, files: Iterable[Path] = ()
) -> dict[str, Path]:
    """Name -> the folder of that name in `out`; a single '' stands for `out` itself. Refuses names
    that lead elsewhere, or two of which are one folder where upper and lower case are one."""
    base = Path(_text(out))
    taken: dict[str, str] = {}
    for name in names:
        alone = name == "" and len(names) == 1
        if (
            not isinstance(name, str)
            or name in (".", "..")
            or not (name or alone)
            or any(c in name for c in "/\\\0")
        ):
            raise QlabError(
                f"the recipe {name!r} has no name for a folder in {out}; choose one without "
                "separators or only dots"
            )
        if any("\ud800" <= c <= "\udfff" for c in name):
            raise QlabError(
                f"the recipe {name!r} has half of a character in its name; choose another"
            )
        folded = unicodedata.normalize("NFKC", name).casefold()
        if folded.endswith(PARTIAL):
            raise QlabError(
                f"the recipe {name!r} ends in {PARTIAL}, as folders do that are still written; "
                "choose another name"
            )
        if folded in taken:
            raise QlabError(
                f"the recipes {taken[folded]!r} and {name!r} are one folder on some file systems; "
                "choose other names"
            )
        taken[folded] = name
    return {name: place(base / name if name else out, model, files) for name in names}


def refuse_early(folder: Path, overwrite: bool, resume: bool) -> None:
    """Refuse, before any work, what names alone show to be no place for an output.
    `refuse_existing` follows once nobody else can write there."""
    if not resume and not os.path.lexists(folder / WORK):
        refuse_existing(folder, overwrite, contents=False)


def refuse_existing(folder: Path, overwrite: bool, contents: bool = True) -> None:
    """Refuse a place where something is, unless it may be replaced and is qlab's. contents: see
    `foreign`."""
    try:
        taken = is_taken(folder)
        reason = foreign(folder, contents) if taken and overwrite else None
        if os.path.isdir(folder) and not os.access(folder, os.W_OK | os.X_OK):
            reason = f"{folder} may not be written to"
    except OSError as error:
        raise QlabError(
            f"{folder} cannot be read ({error.strerror}); choose another output directory"
        ) from error
    if taken and not overwrite:
        raise QlabError(
            f"the output directory {folder} exists and holds something else; choose another, or "
            "--overwrite it if qlab wrote it"
        )
    if reason:
        raise QlabError(
            f"{reason}, so it is not replaced; move it away, or choose another output directory"
        )


def is_taken(folder: Path) -> bool:
    """Whether there is anything that a new folder of this name would displace."""
    return os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder))


def report_place(path: Path) -> Path:
    """Where a report goes, with all links followed: a new file, an empty one, or a report that qlab
    wrote and nobody changed."""
    file = Path(os.path.realpath(path))
    if STREAMS.fullmatch(os.fspath(path)):
        raise QlabError(
            f"--json {path} is no file; a report stands in one by itself, so give --json a name "
            "such as report.json"
        )
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise QlabError(
            f"{path} cannot be written; give --json a file in a folder that is there and may be "
            "written to"
        )
    if file.exists() and not file.is_file():
        raise QlabError(f"{path} is no regular file; give --json the name of one")
    if file.exists() and file.stat().st_size and read_sealed(file) is None:
        raise QlabError(
            f"{path} exists and is no report that qlab wrote and nobody changed; give --json "
            "another name, or remove it"
        )
    return file


def refuse_inside(report: Path, folders: Iterable[Path]) -> None:
    """Refuse a report in the folder of an output, which holds what qlab names in it and nothing
    else."""
    for folder in folders:
        if _is_within(report, folder):
            raise QlabError(
                f"{report} lies in the output directory {folder}; give --json a place outside it"
            )


def folder_for(what: str, folder: Path) -> Path:
    """The folder that is to hold something, made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unwritable(
            f"the folder of {what} {folder} cannot be created ({error.strerror}); name another"
        ) from error
    return folder


def working(folder: Path) -> Path:
    """The folder in which the output `folder` is built."""
    return folder.with_name(folder.name + PARTIAL)


# ------------------------------------------------------------------ parts
def _named(out: str | Path) -> Path:
    text = _text(out)
    try:
        given = Path(text).expanduser()
    except RuntimeError as error:
        raise QlabError(
            f"the output directory {text} is in nobody's home; give another path"
        ) from error
    if given.name in ("", ".."):
        raise QlabError(
            f"the output directory {text!r} is the current folder or one around it; give the path "
            "of a folder of its own"
        )
    if given.name.casefold().endswith(PARTIAL):
        raise QlabError(
            f"the output directory {given} ends in {PARTIAL}, as folders do that are still "
            "written; choose another name"
        )
    try:
        return Path(os.path.realpath(given.parent)) / given.name
    except FileNotFoundError as error:
        raise QlabError(
            f"the output directory {given} lies in the current folder, which is gone; give the "
            "whole path"
        ) from error


def _text(out: str | Path) -> str:
    text = os.fspath(out) if isinstance(out, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise QlabError(f"the output directory {out!r} is no name; give the path of a folder")
    return text


def _refuse_around(folder: Path, reads: Path, role: str) -> None:
    """Refuse an output, or the folder in which it is built, that is what the run reads or holds
    it."""
    real = Path(os.path.realpath(reads))
    if _same(real, folder):
        raise QlabError(
            f"{reads} is {role.removesuffix(',')} itself; choose another output directory"
        )
    for box in (folder, working(folder)):
        if _is_within(real, box):
            raise QlabError(f"the output directory {box} holds {role} {reads}; choose another one")


def _is_within(path: Path | None, folder: Path) -> bool:
    return path is not None and any(_same(box, folder) for box in (path, *path.parents))


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one place, also where upper and lower case are."""
    if one == other:
        return True
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def _current() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # somebody removed it
        return None


def _mount_in(folder: Path) -> Path | None:
    """A place at or below a folder where a file system is mounted."""
    if os.path.ismount(folder):
        return folder
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # another system than Linux
        return None
    points = [Path(_unescaped(line.split(" ")[4])) for line in lines]
    return next((point for point in points if point == folder or folder in point.parents), None)


def _unescaped(text: str) -> str:
    """A path of the kernel's table of mounts, which holds blanks, tabs, line feeds and backslashes
    as octal numbers."""
    for code, character in {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}.items():
        text = text.replace(code, character)
    return text
