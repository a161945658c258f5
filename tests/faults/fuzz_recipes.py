"""What command lines say of a recipe, changed at random: --method, --spec, --scheme, --recipe."""

import json
import random
from pathlib import Path

from families import tiny

from faults import Trial
from faults.inputs import READ, REFUSED, case, refusal
from faults.mutations import NUMBERS, changed_text
from qlab.algebra.bind import Bind
from qlab.algebra.spec import (
    NAMED,
    parse_input_spec,
    parse_spec,
    spec_from_json,
    spec_json,
)
from qlab.algebra.transform import Stage
from qlab.cli.choices import Choices, codec_of, maker_of, recipe_for
from qlab.codecs import CODECS
from qlab.codecs.engines import TARGETS
from qlab.files.checkpoint import open_checkpoint
from qlab.methods import METHODS
from qlab.methods.kv import parse_cache_spec
from qlab.methods.names import STEPS
from qlab.methods.schemes import SCHEMES

SPECS = [
    *("int4-g64", "int8-channel", "int3-g16-asym", "fp8-b128x128", "W4A16", "int4-b16x32"),
    *("fp8-tensor", "int8-token", "int8-head", "2:4", "0.5", "64", *NAMED),
]
PARTS = [*METHODS, *STEPS, *SPECS, *SCHEMES, "-", "+", "=", ":", "*", " static", "-token", "-asym"]
SMALL = [n for n in NUMBERS if not isinstance(n, int) or abs(n) < 2**1000]
SOURCE = "import qlab\ndef mine(spec):\n    return qlab.rtn(spec)\nother = qlab.rtn('int4-g16')\n"


def recipes(shared: Path) -> Trial:
    """Rows of steps with what they take, specs, schemes and files of recipes."""
    tiny("llama").save_pretrained(shared / "model")
    model = open_checkpoint(shared / "model")

    def one(draw: random.Random, folder: Path) -> str:
        spec = _worn(draw, draw.choice(SPECS))
        _specs(spec)
        given = {"spec": spec, "asymmetric": draw.random() < 0.2}
        if draw.random() < 0.3:
            given["scheme"] = _worn(draw, draw.choice([*SCHEMES]))
        if draw.random() < 0.2:
            given["kv_cache"] = _worn(draw, draw.choice([*SCHEMES, "int8-head", "fp8-token"]))
        if draw.random() < 0.2:
            given["bits"] = float(draw.choice([*SMALL, 3.5, 4, 6]))
        if draw.random() < 0.2:
            given["codec"] = _worn(draw, draw.choice([*CODECS]))
        if draw.random() < 0.2:
            given["target"] = _worn(draw, draw.choice([*TARGETS]))
        if draw.random() < 0.2:
            given["keep"] = [_worn(draw, draw.choice(["*.down_proj", "[", "*"]))]
        if draw.random() < 0.2:
            given["outside"] = [_worn(draw, "*head*=int8-channel")]
        if draw.random() < 0.2:
            given["memory"] = float(draw.choice(SMALL))
        if draw.random() < 0.15:
            file = folder / "recipes.py"
            source = changed_text(draw, SOURCE, PARTS)
            file.write_text(source, errors="replace")
            given["recipe"] = f"{file}:{_worn(draw, draw.choice(['mine', 'other']))}"
        row = [_worn(draw, draw.choice([*METHODS, *STEPS])) for _ in range(draw.randint(1, 3))]
        method = "+".join(row)
        typed = frozenset(name for name in given if draw.random() < 0.8)

        def made() -> tuple:
            choices = Choices(**given, typed=typed)
            maker = maker_of(method, choices, "gptq")
            return tuple(recipe_for(model, maker, choices, codec_of(choices, maker)))

        stages, refused = refusal(made)
        if refused:
            return REFUSED
        assert all(isinstance(stage, Stage | Bind) for stage in stages)
        return READ

    return one


def _worn(draw: random.Random, text: str) -> str:
    """A text, often as it is."""
    return text if draw.random() < 0.8 else changed_text(draw, text, PARTS)


def _specs(text: str) -> None:
    """What reads as a spec says the same again by its own name, and as plain data."""
    spec, _ = refusal(lambda: parse_spec(text))
    if spec is not None:
        assert parse_spec(str(spec)) == spec
        assert spec_from_json(json.loads(json.dumps(spec_json(spec)))) == spec
    inputs, _ = refusal(lambda: parse_input_spec(text))
    assert inputs is None or parse_input_spec(str(inputs)) == inputs
    refusal(lambda: parse_cache_spec(text))


CASES = [case("recipes", recipes, bounded=40)]
