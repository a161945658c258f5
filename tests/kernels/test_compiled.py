"""C++ sources compiled on first use: what is kept, what is not loaded, and what is said where
nothing compiles."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qlab_kernels import compiled

SOURCE = 'extern "C" int answer() { return 42; }\n'
ANSWER = """
import sys
from pathlib import Path
from qlab_kernels.compiled import library
print(library(Path(sys.argv[1])).answer())
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("QLAB_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "small.cpp"
    path.write_text(SOURCE)
    try:
        compiled._compiler()
    except compiled.Uncompiled as error:
        pytest.skip(str(error))
    return path


def objects(source):
    return sorted((source.parent / "cache" / "compiled").iterdir())


def started(source):
    command = [sys.executable, "-c", ANSWER, str(source)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_both_get_a_whole_object(source):
    processes = [started(source), started(source)]
    assert [process.communicate()[0].strip() for process in processes] == ["42", "42"]
    assert {path.suffix for path in objects(source)} == {".so"}
    assert not [path for path in objects(source) if path.name.startswith(".")]


def test_a_kept_object_is_not_compiled_again_and_a_truncated_one_is(source, monkeypatch):
    compiler = compiled._compiler()
    name = f"small-{compiled._hash_of_inputs(source, compiler)}"
    place = source.parent / "cache" / "compiled"
    path = compiled._compile(source, compiler, place, name)
    assert compiled._whole(place, name) == path
    path.write_bytes(path.read_bytes()[:-100])
    assert compiled._whole(place, name) is None and not path.exists()
    assert compiled.library(source).answer() == 42
    monkeypatch.setattr(compiled, "_compile", None)  # nothing is compiled from here on
    assert compiled.library(source).answer() == 42


def test_an_object_of_an_older_source_is_not_loaded(source):
    assert compiled.library(source).answer() == 42
    source.write_text(SOURCE.replace("42", "43"))
    assert compiled.library(source).answer() == 43
    assert len(objects(source)) == 2


def test_a_source_that_does_not_compile_says_where(source):
    source.write_text("int answer() { return nothing; }\n")
    with pytest.raises(compiled.Uncompiled, match=r"does not compile small.cpp: .*nothing"):
        compiled.library(source)
    assert objects(source) == []


def test_a_folder_that_cannot_be_written_costs_only_the_keeping(source, monkeypatch):
    (source.parent / "cache").write_text("a file is in the way")
    assert compiled.library(source).answer() == 42


def test_other_machines_are_refused_by_name(source, monkeypatch):
    monkeypatch.setattr(compiled.platform, "machine", lambda: "aarch64")
    with pytest.raises(compiled.Uncompiled, match=r"Linux on x86-64, and this is .* on aarch64"):
        compiled.library(source)


def test_without_a_compiler_the_reason_says_what_to_install(source, monkeypatch):
    from torch._inductor import cpp_builder

    def missing():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(compiled.Uncompiled, match=r"finds no C.. compiler here; install g"):
        compiled.library(source)


def test_the_wheel_has_every_source():
    root = Path(compiled.__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["qlab_kernels"]
    package = root / "kernels" / "qlab_kernels"
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix == ".cpp"}
    assert others and others <= packed
