"""`python -m qlab.bench pack`: the ways there and back, the packers that are installed, and the
rates they must not fall below."""

import json

from qlab.bench.__main__ import main


def test_every_installed_packer_is_timed_on_the_same_codes(command, tmp_path):
    code, out, said = command(
        main, "pack", "--n", 256, "--k", 512, "--reps", 3, "--json", tmp_path / "pack.json"
    )
    record = json.loads((tmp_path / "pack.json").read_text())
    assert (
        code == 0
        and "MB/s of dense bfloat16 weight on one core" in out
        and "compressed-tensors" in said
    )
    timed = {(row["bits"], row["way"], row["contender"]) for row in record["rows"]}
    names = {row["contender"] for row in record["rows"]}
    assert names >= {"qlab", "qlab gptq", "compressed-tensors"} and not names & set(
        record["absent"]
    )
    assert timed == {
        (bits, way, name) for bits in (2, 3, 4, 8) for way in ("pack", "unpack") for name in names
    }
    assert all(row["mbps"] > 0 for row in record["rows"])


def test_shapes_that_some_packer_does_not_take_are_refused(command):
    code, _, said = command(main, "pack", "--n", 40, "--k", 512)
    assert (
        code == 2
        and said
        == "qlab: a weight of 40 x 512 is none that every packer takes; give multiples of 32 and "
        "128\n"
    )
