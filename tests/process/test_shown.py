"""Results in a few lines."""

from qlab.process.shown import by_family


def test_names_that_differ_in_numbers_are_one_entry_with_their_count():
    gates = [f"layers.{i}.mlp.gate" for i in range(94)]
    assert by_family([*gates, "lm_head"]) == ["layers.*.mlp.gate (94)", "lm_head"]
    assert by_family(["experts.0.w1", "layers.3.w3", "experts.1.w3", "blocks.2"]) == [
        "experts.0.w1",
        "layers.3.w3",
        "experts.1.w3",
        "blocks.2",
    ]
    assert by_family([]) == []
