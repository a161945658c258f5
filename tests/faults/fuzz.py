"""All cases of inputs that are changed at random."""

from faults import (
    fuzz_configs,
    fuzz_files,
    fuzz_gguf,
    fuzz_http,
    fuzz_recipes,
    fuzz_tokenizers,
)

MODULES = (fuzz_files, fuzz_gguf, fuzz_configs, fuzz_tokenizers, fuzz_recipes, fuzz_http)
CASES = [case for module in MODULES for case in module.CASES]
