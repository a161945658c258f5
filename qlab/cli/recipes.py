"""Recipes of one's own: FILE.py:NAME, a transform or a function spec -> transform."""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qlab.errors import QlabError, printable
from qlab.process.shown import some

if TYPE_CHECKING:
    from qlab.algebra.spec import Spec
    from qlab.algebra.transform import Transform


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe of a file. path: the file. name: what it is called there. sha256: of the file's
    bytes. content: a transform, or a function spec -> transform."""

    path: Path
    name: str
    sha256: str
    content: Any

    @property
    def takes_spec(self) -> bool:
        """Whether it is a function of a spec."""
        return callable(self.content)

    def transform(self, spec: "Spec") -> "Transform":
        """The transform, whose stages say in their details of which file they are."""
        made = self.content
        if self.takes_spec:
            made = _running(self.path, f"{self.name}({spec})", partial(self.content, spec))
        if not _is_transform(made):
            raise QlabError(
                f"{self.path}:{self.name} returned {_kind(made)}; return a transform, such as "
                "qlab.rtn(spec)"
            )
        origin = f"of {self.path}:{self.name} (sha256 {self.sha256[:16]})"
        return tuple(
            replace(stage, detail=", ".join(filter(None, (stage.detail, origin)))) for stage in made
        )


def is_file(name: str) -> bool:
    """Whether this names a recipe of a file, and not a method."""
    return ".py:" in name.lower() or name.lower().endswith(".py")


def recipe_of_file(text: str) -> Recipe:
    """The recipe FILE.py:NAME. The file is run; what goes wrong there is said in one sentence."""
    file, colon, name = text.rpartition(":")
    if not colon or not file.lower().endswith(".py") or not name:
        raise QlabError(
            f"--recipe {text!r} names no recipe of a file; write FILE.py:NAME, such as "
            "my_recipes.py:mine"
        )
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise QlabError(f"{path} is no file; give --recipe a file of Python that is there")
    source = path.read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    module = ModuleType(f"recipes_{digest[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses of the file look for their names
    _running(path, "", lambda: exec(compile(source, str(path), "exec"), vars(module)))
    if not hasattr(module, name):
        raise QlabError(f"{path} has no {name!r}; it has {_names(module)}")
    content = getattr(module, name)
    if not _is_transform(content) and not _is_function(content):
        raise QlabError(
            f"{path}:{name} is {_kind(content)}; name a transform, such as qlab.rtn('int4-g64'), "
            "or a function of a spec that returns one"
        )
    return Recipe(path=path, name=name, sha256=digest, content=content)


def _running(path: Path, call: str, run: Callable[[], Any]) -> Any:
    """What the file's code returns; what it raises becomes one sentence with the line."""
    try:
        return run()
    except (Exception, SystemExit) as error:
        where = _line(path, error)
        lines = str(error).strip().splitlines() or ["no message"]
        within = f" in {call}" if call else ""
        raise QlabError(
            f"{path}{where}{within} raised {type(error).__name__}: {printable(lines[0])}; mend the "
            "file, and try it with python alone"
        ) from error


def _line(path: Path, error: BaseException) -> str:
    """ ", line N", the last line of the file that was running."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}"
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f", line {line}" if line else ""


def _is_transform(value: object) -> bool:
    from qlab.algebra.transform import Stage

    return isinstance(value, tuple) and bool(value) and all(isinstance(v, Stage) for v in value)


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, type)


def _kind(value: object) -> str:
    return "an empty tuple" if value == () else f"of type {type(value).__name__}"


def _names(module: ModuleType) -> str:
    """The recipes that a file has, for those who look for another one."""
    names = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (_is_transform(value) or (_is_function(value) and value.__module__ == module.__name__))
    ]
    return some(names) if names else "no transforms and no functions of its own"
