"""Make an environment for a library whose requirements do not go together with qlab's: `python
make_env.py gptqmodel DIR`.

Then set QLAB_INTEROP_VENV_GPTQMODEL=DIR and run `pytest tests/interop`. Without it these tests are
skipped and say so.
"""

import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch>=2.11,<2.14"
REQUIREMENTS = {
    "gptqmodel": [TORCH, "gptqmodel==7.6.0"],
    "auto-round": [TORCH, "auto-round==0.16.1"],
    "llmcompressor": [
        TORCH,
        "llmcompressor==0.14.0.1",
    ],  # it pins compressed-tensors 0.19 and transformers 5.15 to 5.17
}


def main(name, directory):
    venv.create(directory, with_pip=True)
    pip = [str(Path(directory, "bin", "python")), "-m", "pip", "install", "--quiet"]
    first, *rest = REQUIREMENTS[name]
    # Other packages look for torch while they are built.
    subprocess.run([*pip, first, "setuptools", "wheel"], check=True)
    subprocess.run([*pip, "--no-build-isolation", *rest], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
