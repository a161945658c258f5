"""Who may import whom, read off the source: layers, doors of foreign libraries, and what `import
qlab` costs."""

import ast
import subprocess
import sys
from functools import cache, wraps
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import qlab

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qlab"
# A module imports from strictly lower layers, or from its own room.
LAYERS = [
    {"errors"},
    {"process"},
    {"algebra"},
    {"methods", "codecs"},
    {"files"},
    {"data", "model"},
    {"driver", "lowering"},
    {"evaluation"},
    {"directories"},
    {"demo", "hf", "generation"},
    {"serving"},
    {"arguments"},
    {"__init__"},
    {"cli"},
    {"bench", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MATHEMATICS = {"errors", "algebra", "methods"}
WALKERS = {
    "algebra/folds.py",
    "algebra/groups.py",
    "algebra/basis.py",
    "algebra/tracing/as_it_is.py",
    "algebra/attention.py",
    "algebra/cached.py",
    "algebra/channels.py",
    "algebra/crossed.py",
    "algebra/graph.py",
    "algebra/interpret.py",
    "algebra/received.py",
    "algebra/stream.py",
    "algebra/tracing/routers.py",
    "algebra/tracing/stretches.py",
    "algebra/tracing/trace.py",
    "algebra/values.py",
    "algebra/wires.py",
    "lowering/compiler/slots.py",
}
MODELS = {"transformers", "safetensors", "accelerate", "huggingface_hub", "gguf"}
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


def each_module(law):
    """A test that asks a law of every file; it names all that break it."""

    @wraps(law)
    def of_all():
        broken = []
        for file in FILES:
            try:
                law(file)
            except AssertionError as error:
                broken.append(f"{file}: {error}")
        assert not broken, "\n".join(broken)

    del of_all.__wrapped__  # pytest would ask for the law's own argument
    return of_all


def unit(file):
    """The layer's name of a file: the package it lies in, or the module itself."""
    return file.split("/")[0].removesuffix(".py")


def imports(file, functions=True, types=True):
    """Dotted names that a file imports; without `functions`, only those that run at import, and
    without `types`, those that run."""
    return imported_by(FILES[file], functions, types)


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported_by(path, functions, types):
    return list(names_imported(path, functions, types))


def names_imported(path, functions, types):
    nodes = list(ast.walk(parsed(path)))
    left_out = set()
    for node in nodes:
        in_function = (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not functions
        )
        for_types = (
            isinstance(node, ast.If)
            and "TYPE_CHECKING" in ast.dump(node.test)
            and not (functions and types)
        )
        if in_function or for_types:
            left_out |= set(ast.walk(node))
    for node in (n for n in nodes if n not in left_out):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(file):
    """The units of qlab that a file imports."""
    for name in imports(file):
        if name.split(".")[0] == "qlab":
            parts = name.split(".")
            yield parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"


def top_level(file, **kwargs):
    return {name.split(".")[0] for name in imports(file, **kwargs)}


@each_module
def test_imports_point_downwards(file):
    here = unit(file)
    assert here in LEVEL, f"give {here} a layer in LAYERS"
    wrong = {name for name in own_imports(file) if name != here and LEVEL[name] >= LEVEL[here]}
    assert not wrong, f"{file} imports {sorted(wrong)}, which are not below it"


def test_the_layers_name_what_exists():
    assert {unit(file) for file in FILES} == set(LEVEL)


def test_no_public_name_is_that_of_a_room():
    assert not set(qlab.__all__) & set(LEVEL)


def test_the_stub_says_where_public_names_are():
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imported = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imported for alias in node.names} == qlab.HOMES


def test_no_circle():
    """Modules import each other in one direction, whether at import or inside a function."""
    names = {
        f"qlab.{file.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__"): file
        for file in FILES
    }
    arrows = {}
    for name, file in names.items():
        imported = {
            full if full in names else full.rpartition(".")[0]
            for full in imports(file, types=False)
        }
        arrows[name] = imported & set(names) - {name, "qlab"}
    assert list(TopologicalSorter(arrows).static_order())


@each_module
def test_mathematics_knows_no_model_library(file):
    if unit(file) in MATHEMATICS:
        assert not top_level(file) & (MODELS | {"rich", "typer", "matplotlib", "numpy"})


@each_module
def test_only_what_walks_programs_uses_fx_and_export(file):
    text = ast.unparse(parsed(FILES[file]))
    uses = "torch.fx" in text or "torch.export" in text or "import fx" in text or ", fx" in text
    assert not uses or file in WALKERS


@each_module
def test_methods_know_neither_devices_nor_files_nor_paths(file):
    if unit(file) == "methods":
        assert not top_level(file) - {
            "torch",
            "qlab",
            "collections",
            "dataclasses",
            "typing",
            "math",
            "functools",
            "einops",
        }
        assert ".cuda(" not in FILES[file].read_text(encoding="utf-8")


@each_module
def test_rooms_that_do_not_know_each_other(file):
    """A format knows no method, running a model knows no quantizing, and lowering knows no
    format."""
    apart = {
        "codecs": {"methods"},
        "methods": {"codecs"},
        "lowering": {"methods", "codecs", "driver"},
    }
    wrong = apart.get(unit(file), set()) & set(own_imports(file))
    assert not wrong, f"{file} imports {sorted(wrong)}"


@each_module
def test_foreign_libraries_come_in_by_their_doors(file):
    doors = {
        "safetensors": set(),  # files/ reads and writes the format itself, one tensor at a time
        "transformers": {
            "files",
            "data",
            "model",
            "demo",
            "directories",
            "hf",
            "generation",
            "lowering",
            "evaluation",
            "bench",
        },
        "accelerate": {"model", "hf", "demo"},
        "blake3": {"files"},
        "compressed_tensors": {"bench"},  # tests read with it; qlab does not need it
        "gptqmodel": {"bench"},
        "matplotlib": {"bench", "evaluation"},
        "lm_eval": {"evaluation"},
        "typer": {"cli", "bench"},
        "torchao": {"lowering", "bench"},
    }
    wrong = {
        library
        for library, units in doors.items()
        if library in top_level(file) and unit(file) not in units
    }
    assert not wrong, f"{file} imports {sorted(wrong)}; their doors are {[doors[w] for w in wrong]}"


@each_module
def test_nothing_imports_kernels_or_plots_at_import(file):
    assert not top_level(file, functions=False) & {
        "triton",
        "torchao",
        "matplotlib",
        "qlab_kernels",
        "vllm",
    }


def test_no_module_is_called_utils_and_kernels_shadows_nothing():
    assert not [file for file in FILES if Path(file).stem in ("utils", "helpers", "common", "misc")]
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_experiments_are_imported_by_nobody():
    assert not [file for file in FILES if "experiments" in top_level(file)]


def test_importing_qlab_loads_neither_plots_nor_kernels():
    # transformers imports torchao and triton wherever they are installed, but works without; so
    # does qlab
    code = (
        "import sys; sys.modules.update(torchao=None, triton=None); import qlab; "
        "print([m for m in ('matplotlib', 'qlab_kernels') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "wrong",
    ["from qlab.driver.solve import solve", "import qlab.driver.plan", "from qlab import quantize"],
)
def test_this_test_sees_a_wrong_import(wrong, tmp_path, monkeypatch):
    path = tmp_path / "transform.py"
    path.write_text(wrong)
    monkeypatch.setitem(FILES, "algebra/transform.py", path)
    with pytest.raises(AssertionError, match="not below it"):
        test_imports_point_downwards()
