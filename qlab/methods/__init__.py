"""One paper, one file. METHODS names what the command line and the benches can run: spec -> transform."""

from collections.abc import Callable, Mapping

from qlab.methods.awq import awq
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn
from qlab.spec import Spec
from qlab.transform import Transform

METHODS: Mapping[str, Callable[[Spec], Transform]] = {"rtn": rtn, "awq": awq, "gptq": gptq}
