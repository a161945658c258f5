"""What only some of qlab needs is asked for there, before any work, and by nothing else."""

import subprocess
import sys

import pytest

import qlab
from qlab.bench.folder import refuse_foreign
from qlab.demo.build import demo_model, demo_text
from qlab.errors import QlabError

EXTRAS = {"gguf": "gguf", "mwparserfromhell": "demo", "matplotlib": "bench"}


def test_every_public_name_loads_without_extras():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({list(EXTRAS)})); import qlab, qlab.hf; "
        "[getattr(qlab, name) for name in qlab.__all__]; import qlab.cli; qlab.cli.main()"
    )
    run = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0 and "quantize" in done.stdout, done.stderr


@pytest.fixture
def without(monkeypatch, tmp_path):
    for library in EXTRAS:
        monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delenv("QLAB_DEMO", raising=False)
    monkeypatch.setenv("QLAB_HOME", str(tmp_path / "home"))
    return tmp_path


def acts(folder):
    file = folder / "model.gguf"
    file.write_bytes(b"GGUF")
    return {
        "gguf": lambda: qlab.convert(file, "compressed-tensors", folder / "out"),
        "demo": demo_model,
        "text": lambda: demo_text("heldout"),
        "bench": lambda: refuse_foreign(folder / "out", ["rtn"], {}, folder / "model", []),
    }


@pytest.mark.parametrize(
    "act, library, extra",
    [
        ("gguf", "gguf", "gguf"),
        ("demo", "gguf", "demo"),
        ("text", "mwparserfromhell", "demo"),
        ("bench", "matplotlib", "bench"),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_cure(act, library, extra, without):
    words = rf"^{library} is not installed; `pip install 'qlab\[{extra}\]'` brings it$"
    with pytest.raises(QlabError, match=words):
        acts(without)[act]()
    assert not (without / "out").exists() and not (without / "home" / "demo" / act).exists()
