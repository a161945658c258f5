"""What a configuration says of run time, what a plan says, and what the end of a run accepts."""

from mutants.planting import Mutant

MUTANTS = [
    Mutant(
        "rotations: queries and keys by unlike matrices",
        "codecs/compressed_tensors/at_run_time.py",
        "refusal",
        "query is key or (query is not None and key is not None and torch.equal(query, key))",
        "(query is None) == (key is None)",
        "codecs/at_run_time",
    ),
    Mutant(
        "rotations: nearly a Hadamard matrix",
        "codecs/compressed_tensors/rotations.py",
        "",
        "1e-05",
        "0.001",
        "codecs/at_run_time",
    ),
    Mutant(
        "rotations: signs alone make a Hadamard matrix",
        "codecs/compressed_tensors/rotations.py",
        "_is_hadamard",
        "torch.equal(signs @ signs.T, n * identity)",
        "True",
        "codecs/at_run_time",
    ),
    Mutant(
        "schedule: what a rotation lets go of is still known",
        "driver/schedule.py",
        "_Seen.passes",
        "isinstance(stage.view, Gauged) and stage.view.left",
        "False",
        "driver/schedule",
    ),
    Mutant(
        "the end of a run: 100 times as much is accepted",
        "driver/ending.py",
        "",
        "0.001",
        "0.1",
        "driver/ending",
    ),
    Mutant(
        "the end of a run: grids of inputs are not compared",
        "driver/ending.py",
        "_refuse_other_grids",
        "(('weights', written.quantized, specs), ('inputs', written.inputs, inputs))",
        "(('weights', written.quantized, specs),)",
        "driver/ending",
    ),
    Mutant(
        "the end of a run: another matrix at run time passes",
        "driver/around.py",
        "_numbers",
        "('group', 'tensor')",
        "('group', 'tensor', 'sha256')",
        "driver/ending",
    ),
]
