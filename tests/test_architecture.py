"""Who may import whom, read off the source: layers, doors of foreign libraries, and what `import qlab` costs."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qlab"
# A module imports from strictly lower layers, or from its own package. A package is one layer of all its files.
LAYERS = [
    {"errors", "processor", "quiet", "surroundings"},
    {"bits", "products", "progress", "scope", "shown", "spec", "taken_apart"}, {"qtensor", "targets"}, {"certificate", "grid"},
    {"online"},
    {"experts"}, {"graph"}, {"as_it_is", "kept", "on_meta", "on_tensors"}, {"survey", "unrolled"}, {"stretches"}, {"trace"},
    {"interpret", "programs"}, {"stats"}, {"claims", "rounding", "zeros"}, {"transform"}, {"channels"}, {"absorb"}, {"methods"},
    {"codecs"},
    {"documents", "tokenizing"}, {"texts"}, {"files"}, {"calibration"},
    {"images", "model"}, {"lossless"}, {"states", "sweep"}, {"report"}, {"siblings"},
    {"duration", "effects", "outside", "stored", "memory"}, {"plan"}, {"quantize"}, {"from_gguf"},
    {"covered"}, {"convert", "verify", "inspection", "model_free"}, {"evaluate", "lower"}, {"results"},
    {"demo"}, {"hub", "hf", "serve"}, {"kinds"}, {"doors"}, {"__init__"}, {"cli"}, {"bench", "__main__"},
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MATHEMATICS = {"errors", "scope", "spec", "taken_apart", "on_tensors", "as_it_is", "unrolled", "qtensor", "experts", "graph", "trace",
               "interpret", "products", "programs", "processor", "stats", "rounding", "zeros", "grid", "bits", "online",
               "transform", "channels", "absorb", "methods", "kept", "on_meta", "survey", "stretches",
               "claims"}
MODELS = {"transformers", "safetensors", "accelerate", "huggingface_hub", "gguf"}
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
modules = pytest.mark.parametrize("file", FILES)


def unit(file):
    """The layer's name of a file: the package it lies in, or the module itself."""
    return file.split("/")[0].removesuffix(".py")


def imports(file, everywhere=True):
    """Dotted names that a file imports; without `everywhere`, only those that run at import."""
    return imported_by(FILES[file], everywhere)


@cache
def imported_by(path, everywhere):
    return list(names_imported(path, everywhere))


def names_imported(path, everywhere):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    if not everywhere:
        inside = {n for f in nodes if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) for n in ast.walk(f)}
        guarded = {n for i in nodes if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test) for n in ast.walk(i)}
        nodes = [n for n in nodes if n not in inside | guarded]
    for node in nodes:
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


@modules
def test_imports_point_downwards(file):
    here = unit(file)
    assert here in LEVEL, f"give {here} a layer in LAYERS"
    wrong = {name for name in own_imports(file) if name != here and LEVEL[name] >= LEVEL[here]}
    assert not wrong, f"{file} imports {sorted(wrong)}, which are not below it"


def test_the_layers_name_what_exists():
    assert {unit(file) for file in FILES} >= MATHEMATICS | {"codecs", "files", "model", "sweep", "plan", "quantize"}


@modules
def test_mathematics_knows_no_model_library(file):
    if unit(file) in MATHEMATICS:
        assert not top_level(file) & (MODELS | {"rich", "typer", "matplotlib", "numpy"})


@modules
def test_only_what_walks_programs_uses_fx_and_export(file):
    text = ast.unparse(ast.parse(FILES[file].read_text(encoding="utf-8")))
    uses = "torch.fx" in text or "torch.export" in text or "import fx" in text or ", fx" in text
    assert not uses or file in ("as_it_is.py", "stretches.py", "graph.py", "trace.py", "interpret.py", "channels.py", "absorb.py")


@modules
def test_methods_know_neither_devices_nor_files_nor_paths(file):
    if unit(file) == "methods":
        assert not top_level(file) - {"torch", "qlab", "collections", "dataclasses", "typing", "math", "functools", "einops"}
        assert ".cuda(" not in FILES[file].read_text(encoding="utf-8")


@modules
def test_rooms_that_do_not_know_each_other(file):
    """A format knows no method, running a model knows no quantizing, and lowering knows no format."""
    apart = {
        "codecs": {"methods"},
        "methods": {"codecs"},
        "lower": {"methods", "codecs", "sweep", "plan", "quantize", "report", "memory"},
    }
    wrong = apart.get(unit(file), set()) & set(own_imports(file))
    assert not wrong, f"{file} imports {sorted(wrong)}"


@modules
def test_foreign_libraries_come_in_by_their_doors(file):
    doors = {
        "safetensors": set(),  # files/ reads and writes the format itself, one tensor at a time
        "transformers": {"files", "calibration", "images", "model", "demo", "from_gguf", "hf", "hub", "lower", "serve", "evaluate",
                         "bench"},
        "accelerate": {"model", "hf", "hub"},
        "compressed_tensors": {"bench"},  # tests read with it; qlab does not need it
        "gptqmodel": {"bench"},
        "matplotlib": {"bench", "report"},
        "typer": {"cli", "bench"},
        "torchao": {"lower", "bench"},
    }
    wrong = {library for library, units in doors.items() if library in top_level(file) and unit(file) not in units}
    assert not wrong, f"{file} imports {sorted(wrong)}; their doors are {[doors[w] for w in wrong]}"


@modules
def test_nothing_imports_kernels_or_plots_at_import(file):
    assert not top_level(file, everywhere=False) & {"triton", "torchao", "matplotlib", "qlab_kernels", "vllm"}


def test_no_module_is_called_utils_and_kernels_shadows_nothing():
    assert not [file for file in FILES if Path(file).stem in ("utils", "helpers", "common", "misc")]
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_experiments_are_imported_by_nobody():
    assert not [file for file in FILES if "experiments" in top_level(file)]


def test_importing_qlab_loads_neither_plots_nor_kernels():
    # transformers imports torchao and triton wherever they are installed, but works without; so does qlab
    code = ("import sys; sys.modules.update(torchao=None, triton=None); import qlab; "
            "print([m for m in ('matplotlib', 'qlab_kernels') if m in sys.modules])")  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("wrong", ["from qlab.sweep import solve", "import qlab.plan", "from qlab import quantize"])
def test_this_test_sees_a_wrong_import(wrong, tmp_path, monkeypatch):
    path = tmp_path / "transform.py"
    path.write_text(wrong)
    monkeypatch.setitem(FILES, "transform.py", path)
    with pytest.raises(AssertionError, match="not below it"):
        test_imports_point_downwards("transform.py")
