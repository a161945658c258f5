"""Tasks by their names: lm-eval's own, or those of a folder of YAML files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml  # with functions, which the index leaves out

from qlab.errors import QlabError, first_line
from qlab.process.progress import say
from qlab.process.shown import some


@dataclass(frozen=True)
class Loaded:
    """tasks: name -> lm-eval's task, with its data. groups: name -> the names of its tasks."""

    tasks: Mapping[str, Any]
    groups: Mapping[str, tuple[str, ...]]


def load(names: Sequence[str], folder: Path | None) -> Loaded:
    """The tasks of these names, which may be groups, tags and patterns, with their data.

    Args:
        names: of tasks.
        folder: with YAML files of tasks, the only ones then; None takes lm-eval's own.

    Raises:
        QlabError: a folder without tasks, a name that no task has, data that cannot be had, tasks
            that run code or show images.
    """
    manager = _of_lm_eval() if folder is None else _of_folder(folder)
    tasks: dict[str, Any] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            raise QlabError(_unknown(name, manager, folder))
        for match in matches:
            loaded = _with_data(manager, match)
            tasks |= loaded["tasks"]
            groups |= {
                group.name: tuple(task.task_name for task in group.get_all_tasks())
                for group in loaded["groups"].values()
            }
    for name, task in tasks.items():
        _check(name, task)
    return Loaded(tasks, groups)


@cache
def _of_lm_eval() -> TaskManager:
    say("reading the names of lm-eval's tasks")
    return TaskManager()


def _of_folder(folder: Path) -> TaskManager:
    if not folder.is_dir():
        raise QlabError(f"{folder} is no folder; give one with YAML files of tasks")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if not manager.all_tasks:
        raise QlabError(
            f"{folder} has no task: no *.yaml in it says `task: NAME`{_unread(manager, folder)}; "
            "write one in lm-eval's form"
        )
    for entry in manager.task_index.values():
        if entry.yaml_path is not None and _has_local_data(entry.cfg):
            config = load_yaml(entry.yaml_path)
            given = dict(config["dataset_kwargs"])
            files = _beside(entry.yaml_path.parent, given["data_files"])
            entry.cfg = {**config, "dataset_kwargs": {**given, "data_files": files}}
            entry.yaml_path = None  # or lm-eval reads the file anew
    return manager


def _has_local_data(config: Mapping[str, Any] | None) -> bool:
    given = (config or {}).get("dataset_kwargs")
    return isinstance(given, Mapping) and "data_files" in given


def _beside(folder: Path, files: Any) -> Any:
    """The files of a task, those whose paths are relative to the task's folder in full."""
    if isinstance(files, Mapping):
        return {split: _beside(folder, file) for split, file in files.items()}
    if isinstance(files, list):
        return [_beside(folder, file) for file in files]
    path = folder / str(files)
    return str(path.resolve()) if path.exists() else files


def _unread(manager: TaskManager, folder: Path) -> str:
    """The files of a folder that lm-eval does not take for tasks, in words."""
    read = {entry.yaml_path for entry in manager.task_index.values()}
    others = [path.name for path in sorted(folder.glob("**/*.yaml")) if path not in read]
    return f" ({some(others)} cannot be read as one)" if others else ""


def _unknown(name: str, manager: TaskManager, folder: Path | None) -> str:
    near = get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
    there = "near are" if near else "there are"
    known = some(near or manager.all_tasks)
    if folder is None:
        return f"lm-eval has no task {name!r}; {there} {known}, and a folder may have your own"
    return f"{folder} has no task {name!r}; {there} {known}"


def _with_data(manager: TaskManager, name: str) -> Any:
    try:
        return manager.load([name])
    except Exception as error:  # whatever its YAML, its code or the place of its data raises
        raise QlabError(
            f"task {name} cannot be loaded ({type(error).__name__}: {first_line(error):.200}); "
            "where the hub cannot be reached, give a folder with a YAML file whose data_files are "
            "local"
        ) from error


def _check(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise QlabError(
            f"task {name} runs the code that a model writes, which qlab does not; leave it out, or "
            "run lm-eval in a sandbox against `qlab serve`"
        )
    if getattr(task, "MULTIMODAL", False):
        raise QlabError(
            f"task {name} shows images, which qlab's models of lm-eval do not; leave it out"
        )
    if not len(task.eval_docs):
        raise QlabError(f"task {name} has no document; look at its test split")
