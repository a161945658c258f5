"""The methods of the command line, with few steps where they learn."""

from qlab.methods import METHODS
from qlab.methods.auto_round import auto_round
from qlab.methods.qat import qat

LEARNING = {
    "auto_round": lambda spec: auto_round(spec, steps=2, windows=2),
    "qat": lambda spec: qat(spec, steps=2, windows=2),
}
QUICK = {**METHODS, **LEARNING}
