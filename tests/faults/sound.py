"""What must hold of an output, whatever happened: it is whole, or nobody takes it for a model."""

from functools import partial
from pathlib import Path

from killing import finish, start

import qlab
from faults.runs import Run, quietly, there
from qlab.files.place import WORK, working


def refuse_half(run: Run, out: Path) -> None:
    """Nothing that is opened as a model is less than the whole."""
    for folder in (out, working(out)):
        if folder.is_file():
            assert there(folder) == run.expected, f"{run.name}: {folder.name} is half a file"
            continue
        try:
            qlab.open(folder)
        except qlab.QlabError:
            continue
        here = {
            name: data
            for name, data in there(folder).items()
            if not name.startswith(WORK) and not name.endswith(".tmp")
        }
        others = {name for name, data in here.items() if run.expected.get(name) != data}
        missing = run.expected.keys() - here.keys() - {"qlab.json"}
        assert not missing, f"{run.name}: {folder.name} opens and lacks {sorted(missing)}"
        assert not others, f"{run.name}: {folder.name} opens with others' {sorted(others)}"


def resumed(run: Run, out: Path, **options: bool) -> None:
    """The run, resumed, ends with what an untroubled run writes, and leaves nothing beside it. A
    file that is whole is not begun anew."""
    if not out.is_file():
        _go_on(run, out, **options)
    here, expected = there(out), run.expected
    names = expected.keys() | here.keys()
    others = [name for name in names if here.get(name) != expected.get(name)]
    assert not others, f"{run.name}: {sorted(others)} are not what an untroubled run writes"
    beside = sorted(path.name for path in out.parent.iterdir() if path != out)
    assert not beside, f"{run.name}: {beside} are left beside the output"


def _go_on(run: Run, out: Path, **options: bool) -> None:
    again = partial(run.write, out, resume=True, **options)
    told = out.parent / "told"
    code = finish(start(quietly(again, told)))
    said = told.read_text()
    told.unlink()
    assert code == 0 and not said, f"{run.name} does not resume: {code} {said}"
