"""A config.json that claims what no file holds is refused in one sentence, before memory is asked
for, by every command that builds its model."""

import json
import shutil

import pytest
from model_folders import add_tokenizer

import qlab.cli

FAR = 2_000_000_000


@pytest.fixture
def claiming(saved, tmp_path):
    """claiming(name=value) -> a copy of a tiny model whose config.json says so."""

    def claiming(**said):
        folder = tmp_path / "model"
        shutil.copytree(saved(), folder, symlinks=False, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **said}))
        return folder

    return claiming


def called(command, name, folder, tmp_path):
    """What a command says of a directory. "alone": a plan of its configuration without weights."""
    if name == "alone":
        (tmp_path / "alone").mkdir()
        shutil.copy(folder / "config.json", tmp_path / "alone")
        name, folder = "plan", tmp_path / "alone"
    (tmp_path / "asked").write_text('{"prompt": [1, 2]}\n')
    words = {
        "plan": ["--method", "rtn"],
        "quantize": ["--method", "rtn", "--out", tmp_path / "out"],
        "run": ["--in", tmp_path / "asked", "--out", tmp_path / "answers"],
    }
    return command(qlab.cli.main, name, folder, *words[name])


@pytest.mark.parametrize(
    "said, words",
    [
        ({"vocab_size": FAR}, f"{FAR} x 64 numbers"),
        ({"hidden_size": FAR}, f"x {FAR} numbers"),
        ({"intermediate_size": FAR}, f"{FAR} x 64 numbers"),
        ({"num_key_value_heads": FAR}, f"{16 * FAR} x 64 numbers"),
        ({"vocab_size": 10**18}, "vocab_size 1000000000000000000, and it goes from 1 to"),
        ({"vocab_size": 0}, "vocab_size 0, and it goes from 1 to 2,147,483,648"),
        ({"intermediate_size": -64}, "intermediate_size -64, and it goes from 0 to"),
        ({"num_hidden_layers": -1}, "num_hidden_layers -1, and it goes from 1 to"),
        ({"hidden_size": "64"}, "Field 'hidden_size' expected int, got str"),
    ],
)
@pytest.mark.parametrize("name", ["plan", "alone", "quantize"])
def test_what_no_file_holds_is_refused_before_it_is_built(
    command, claiming, tmp_path, name, said, words
):
    code, _, told = called(command, name, claiming(**said), tmp_path)
    assert code == 2 and words in told and len(told.splitlines()) == 1
    assert "config.json" in told and "llocat" not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "said, words",
    [({"vocab_size": FAR}, f"{FAR} x 64 numbers"), ({"vocab_size": 99}, "describes a model with")],
)
def test_a_reply_is_refused_with_the_tensor_of_another_model(
    command, claiming, tmp_path, said, words
):
    folder = claiming(**said)
    add_tokenizer(folder)
    code, _, told = called(command, "run", folder, tmp_path)
    assert code == 2 and words in told.splitlines()[-1] and "embed_tokens" in told


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_configuration_of_tensors_without_numbers_is_refused(command, claiming, tmp_path):
    code, _, told = called(command, "alone", claiming(intermediate_size=0), tmp_path)
    assert code == 2 and "gate_proj.weight of 0 x 64 numbers; correct its sizes" in told
