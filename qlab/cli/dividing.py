"""quantize --jobs: the words of a command in a shared folder, and the run that they stand for."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlab.cli.choices import Choices, codec_of, job_of, maker_of, recipe_for
from qlab.cli.model_free import refuse_of_runs
from qlab.cli.options import ONE_FILE, resolved
from qlab.errors import QlabError

if TYPE_CHECKING:
    from qlab.driver.pieces import Pieces
    from qlab.files.runs import PlannedRun

PATHS = ("calib", "images")  # choices that are files


@dataclass(frozen=True, kw_only=True)
class Words:
    """What a command line of quantize says, with whole paths: other machines read it in folders of
    their own.

    model: a directory or 'demo'. out: the directory to write. kept: the folder of statistics, or
    None for that of the jobs. Others as their options.
    """

    model: str
    out: Path
    method: str
    choices: Choices
    model_free: bool
    include: list[str] | None
    exclude: list[str] | None
    overwrite: bool
    kept: Path | None

    def json(self) -> dict[str, Any]:
        """The words as plain data."""
        chosen = {each.name: getattr(self.choices, each.name) for each in fields(Choices)}
        for name in PATHS:
            chosen[name] = chosen[name] and [str(path.resolve()) for path in chosen[name]]
        chosen["offload"] = self.choices.offload and str(self.choices.offload.resolve())
        if self.choices.recipe:
            file, _, name = self.choices.recipe.rpartition(":")
            chosen["recipe"] = f"{Path(file).expanduser().resolve()}:{name}"
        return {
            "model": str(resolved(self.model).resolve()),
            "out": str(self.out),
            "method": self.method,
            "choices": {**chosen, "typed": sorted(self.choices.typed)},
            "model_free": self.model_free,
            "include": self.include,
            "exclude": self.exclude,
            "overwrite": self.overwrite,
            "kept": self.kept and str(self.kept.resolve()),
        }

    def pieces(self, jobs: Path, sha256: str | None) -> "Pieces":
        """The run. jobs: the shared folder. sha256: of the model's files, where it is known."""
        from qlab.driver.pieces import Blocks, Whole, is_divisible
        from qlab.files.statistics import Shelf

        if self.model_free:
            return self._files()
        job = job_of(self.model, self.method, self.choices)
        if job.codec in ONE_FILE:
            raise QlabError(
                f"--codec {job.codec} is one file, which is not made in parts; quantize into a "
                "directory, and convert it"
            )
        if not is_divisible(job):
            kept = self.kept if job.inputs == "reference" else None
            return Whole(job, kept)
        return Blocks(job, Shelf(self.kept or jobs / "statistics"), sha256)

    def _files(self) -> "Pieces":
        from qlab.directories.model_free import KEPT, Files
        from qlab.files.checkpoint import open_checkpoint

        refuse_of_runs(self.choices)
        opened = open_checkpoint(resolved(self.model))
        maker = maker_of(self.method, self.choices, usual="rtn")
        codec = codec_of(self.choices, maker)
        return Files(
            opened,
            recipe_for(opened, maker, self.choices, codec),
            self.out,
            include=self.include or ("*",),
            exclude=(*KEPT, *(self.exclude or ())),
            codec=codec,
            target=self.choices.target or None,
        )


def words_of(said: Mapping[str, Any]) -> Words:
    """The words that were written as plain data."""
    chosen = dict(said["choices"])
    for name in PATHS:
        chosen[name] = chosen[name] and [Path(path) for path in chosen[name]]
    chosen["offload"] = chosen["offload"] and Path(chosen["offload"])
    choices = Choices(**{**chosen, "typed": frozenset(chosen["typed"])})
    kept = said["kept"] and Path(said["kept"])
    return Words(**{**said, "choices": choices, "out": Path(said["out"]), "kept": kept})


def add(words: Words, jobs: Path) -> "PlannedRun":
    """Add a run to a shared folder, which refuses what quantize refuses."""
    from qlab.driver.shelved import stamps
    from qlab.files.runs import add_run

    pieces = words.pieces(jobs, None)
    said = {
        "out": str(words.out),
        "words": words.json(),
        "identity": dict(pieces.identity),
        "pieces": pieces.count,
        "model": {"sha256": pieces.sha256, "stamps": stamps(pieces.model)},
    }
    return add_run(jobs, said)


def pieces_of(run: "PlannedRun", jobs: Path) -> "Pieces":
    """The run as this process would do it; refuses one that was asked for of another model, other
    data or other versions."""
    from qlab.driver.shelved import stamps
    from qlab.files.checkpoint import open_checkpoint

    words = words_of(run.said["words"])
    noted = run.said["model"]
    unchanged = stamps(open_checkpoint(words.model)) == noted["stamps"]
    pieces = words.pieces(jobs, noted["sha256"] if unchanged else None)
    _refuse_another(run, pieces.identity)
    return pieces


WHAT = {
    "source": "the model",
    "recipe": "the recipe",
    "data": "the calibration data",
    "device": "the device",
    "sites": "the chosen weights",
}


def _refuse_another(run: "PlannedRun", here: Mapping[str, Any]) -> None:
    there, here = run.said["identity"], json.loads(json.dumps(here))
    if there == here:
        return
    # the model decides others of them
    for name in sorted(there.keys() | here.keys(), key=lambda name: (name != "source", name)):
        was, now = there.get(name), here.get(name)
        if name == "versions" and was and now and was != now:
            package = next(p for p in sorted({*was, *now}) if was.get(p) != now.get(p))
            raise QlabError(
                f"{run.folder} was begun with {package} {was.get(package)}, and this is "
                f"{now.get(package)}; work with the same versions, or remove it and add the run "
                "again"
            )
        if was != now:
            raise QlabError(
                f"{run.folder} was begun for {run.out}, and {WHAT.get(name, name)} is another by "
                "now; remove it and add the run again"
            )
