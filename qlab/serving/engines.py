"""Other inference engines, run on a directory with the flags that mean what qlab's mean.

An engine lives in an environment of its own, since no two of them and qlab want the same torch: its
interpreter runs its server in the place of this process, which therefore has its exit code and gets
its signals.

Sources of the flags: vLLM 0.33, LMDeploy 0.18, SGLang 0.5.23.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlab.directories.loaded_by import refuse_unloadable
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.process.progress import say

SHOWN = "KEY"  # stands for a key wherever a command is shown
HAS = "import importlib.util, sys; sys.exit(importlib.util.find_spec({library!r}) is None)"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How an engine is asked for what qlab's options ask for.

    library: the package. module: what `python -m` runs. before: the words in front of the
    directory. flags: option of qlab -> the engine's flag. targets: the names of what it loads, with
    the flags of each. caches: name of a cache -> the engine's word behind its flag of "--kv-cache".
    key_flag: the flag of an API key. key_variable: the variable of the environment that holds one
    instead, which no list of processes shows. several_keys: whether there may be more than one.
    variables: option of qlab -> a variable of the environment that holds its value. with_ssl: a
    flag that certificates need.
    """

    library: str
    module: str
    before: tuple[str, ...]
    flags: Mapping[str, str]
    targets: Mapping[str, tuple[str, ...]]
    caches: Mapping[str, str] = field(default_factory=dict)
    key_flag: str = ""
    key_variable: str = ""
    several_keys: bool = True
    variables: Mapping[str, str] = field(default_factory=dict)
    with_ssl: tuple[str, ...] = ()


ENGINES: Mapping[str, Engine] = {
    "vllm": Engine(
        library="vllm",
        module="vllm.entrypoints.cli.main",
        before=("serve",),
        flags={
            "--host": "--host",
            "--port": "--port",
            "--served-model-name": "--served-model-name",
            "--dtype": "--dtype",
            "--max-model-len": "--max-model-len",
            "--max-num-seqs": "--max-num-seqs",
            "--tensor-parallel": "--tensor-parallel-size",
            "--kv-cache": "--kv-cache-dtype",
            "--ssl-certfile": "--ssl-certfile",
            "--ssl-keyfile": "--ssl-keyfile",
        },
        targets={"vllm": ()},
        caches={
            "fp8": "fp8",
            "int8": "int8_per_token_head",
            "int4": "int4_per_token_head",
        },
        key_flag="--api-key",
        key_variable="VLLM_API_KEY",
    ),
    "lmdeploy": Engine(
        library="lmdeploy",
        module="lmdeploy",
        before=("serve", "api_server"),
        flags={
            "--host": "--server-name",
            "--port": "--server-port",
            "--served-model-name": "--model-name",
            "--dtype": "--dtype",
            "--max-model-len": "--session-len",
            "--max-num-seqs": "--max-batch-size",
            "--tensor-parallel": "--tp",
            "--kv-cache": "--quant-policy",
        },
        targets={
            "lmdeploy-turbomind": ("--backend", "turbomind"),
            "lmdeploy-pytorch": ("--backend", "pytorch"),
        },
        caches={"fp8": "fp8", "int8": "int8", "int4": "int4"},
        key_flag="--api-keys",
        variables={"--ssl-certfile": "SSL_CERTFILE", "--ssl-keyfile": "SSL_KEYFILE"},
        with_ssl=("--ssl",),
    ),
    "sglang": Engine(
        library="sglang",
        module="sglang.launch_server",
        before=("--model-path",),
        flags={
            "--host": "--host",
            "--port": "--port",
            "--served-model-name": "--served-model-name",
            "--dtype": "--dtype",
            "--max-model-len": "--context-length",
            "--max-num-seqs": "--max-running-requests",
            "--tensor-parallel": "--tp-size",
            "--kv-cache": "--kv-cache-dtype",
        },
        targets={"sglang": ()},
        caches={"fp8": "fp8_e4m3"},
        key_flag="--api-key",
        several_keys=False,
    ),
}


@dataclass(frozen=True)
class Command:
    """A command line, and what it has beside this process's environment. shown: the same words with
    a placeholder for each key."""

    words: tuple[str, ...]
    shown: tuple[str, ...]
    environment: Mapping[str, str]
    key_variable: str

    def __str__(self) -> str:
        """As a shell takes it; keys are not in it."""
        variables = {**self.environment, **({self.key_variable: SHOWN} if self.has_key else {})}
        settings = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        return " ".join([*settings, shlex.join(self.shown)])

    @property
    def has_key(self) -> bool:
        return self.key_variable in self.environment

    def run(self) -> None:
        """Become this command."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(self.words[0], list(self.words), {**os.environ, **self.environment})


def engine_named(name: str) -> Engine:
    """The engine of that name; refuses an unknown one."""
    if name not in ENGINES:
        raise QlabError(
            f"the engine {name!r} is unknown; qlab runs {', '.join(ENGINES)}, or serves itself "
            "without --engine"
        )
    return ENGINES[name]


def command_for(
    name: str,
    model: Checkpoint,
    options: Mapping[str, str],
    keys: Sequence[str] = (),
    python: Path | None = None,
) -> Command:
    """The command that serves a directory with an engine.

    Args:
        name: Of the engine, a key of `ENGINES`.
        model: The directory, which has to be one that the engine loads.
        options: Option of `qlab serve` -> its value, for all that were chosen.
        keys: API keys.
        python: The interpreter of the engine's environment; None for this process's own.

    Raises:
        QlabError: The engine does not load the directory, or has nothing that means what an option
            means.
    """
    engine = engine_named(name)
    unknown = [option for option in options if option not in {**engine.flags, **engine.variables}]
    if unknown:
        raise QlabError(
            f"{name} has nothing that means {unknown[0]}; leave it out, or serve with qlab itself"
        )
    cache = options.get("--kv-cache")
    if cache is not None and cache not in engine.caches:
        raise QlabError(
            f"{name} has no cache {cache!r} that is chosen when it is started; it has "
            f"{', '.join(engine.caches)}"
        )
    told = {**options, **({} if cache is None else {"--kv-cache": engine.caches[cache]})}
    words = [str(python or sys.executable), "-m", engine.module, *engine.before, str(model.path)]
    words += _backend(name, engine, model, int(options.get("--tensor-parallel", 1)))
    for option, value in told.items():
        words += [engine.flags[option], value] if option in engine.flags else []
    variables = {
        variable: told[option] for option, variable in engine.variables.items() if option in told
    }
    words += engine.with_ssl if variables else ()
    return _with_keys(name, engine, words, variables, keys)


def _backend(name: str, engine: Engine, model: Checkpoint, ranks: int) -> tuple[str, ...]:
    """The flags of the first of the engine's own engines that loads the directory; refuses one that
    none loads by what each of them says."""
    reasons: list[str] = []
    for target, flags in engine.targets.items():
        try:
            refuse_unloadable(model, target, ranks)
        except QlabError as error:
            reasons.append(str(error))
        else:
            return flags
    raise QlabError("; ".join(reasons))


def _with_keys(
    name: str,
    engine: Engine,
    words: Sequence[str],
    variables: Mapping[str, str],
    keys: Sequence[str],
) -> Command:
    """The command with its API keys: by the environment where the engine reads one there."""
    if len(keys) > 1 and not engine.several_keys:
        raise QlabError(f"{name} takes one API key, and {len(keys)} were given; give one")
    by_environment = bool(engine.key_variable) and len(keys) == 1
    shown = list(words)
    if by_environment:
        variables = {**variables, engine.key_variable: keys[0]}
    elif keys:
        say(f"qlab: {name} takes keys on its command line, where other users of the machine see it")
        words = [*words, engine.key_flag, *keys]
        shown += [engine.key_flag, *(SHOWN for _ in keys)]
    return Command(tuple(words), tuple(shown), variables, engine.key_variable)


def refuse_missing(name: str, python: Path | None) -> None:
    """Refuse an interpreter that is not there, or in whose environment the engine is not."""
    engine, interpreter = engine_named(name), str(python or sys.executable)
    asks = [interpreter, "-c", HAS.format(library=engine.library)]
    try:
        found = subprocess.run(asks, capture_output=True, text=True, check=False)
    except OSError as error:
        raise QlabError(
            f"{interpreter} cannot be run ({error.strerror}); give --engine-python the interpreter "
            f"of {name}'s environment"
        ) from error
    if found.returncode:
        raise QlabError(
            f"{engine.library} is not installed for {interpreter}; install it there, or give "
            "--engine-python the interpreter of its environment"
        )
