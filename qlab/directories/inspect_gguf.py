"""What a GGUF file holds, from its keys and the list of its tensors alone."""

from collections import Counter
from pathlib import Path
from typing import Any

from qlab.codecs import gguf as file_format
from qlab.codecs import gguf_blocks
from qlab.directories.gguf import record_of


def facts_of(path: Path) -> dict[str, Any]:
    """The fields of `Inspection`: weights under the names of the model where qlab wrote the file,
    else under the file's own."""
    reader, arch = file_format.opened(path)
    fields = file_format.fields(reader)
    record = record_of(path, fields)
    rows = {name: dict(row) for name, row in record.get("sites", {}).items()}
    weights = [f"{name}.weight" for name in rows]
    called = file_format.file_names(arch, file_format.blocks_of(path, reader, arch), weights)
    names: dict[str, list[str]] = {}  # a tensor may be of all experts
    for name, file in called.items():
        names.setdefault(str(file), []).append(name.removesuffix(".weight"))
    dtypes: Counter[str] = Counter()
    sites: dict[str, dict[str, Any]] = {}
    unquantized: dict[str, str] = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        dtypes[kind] += int(tensor.n_bytes)
        stored = f"{kind} {'x'.join(str(size) for size in reversed(tensor.shape.tolist()))}"
        if kind not in file_format.BITS or len(tensor.shape) not in (2, 3):
            unquantized[tensor.name] = stored
            continue
        spec = str(gguf_blocks.spec_of(file_format.BITS[kind]))
        modules = names.get(tensor.name, [tensor.name.removesuffix(".weight")])
        told = {"spec": spec, "stored": stored, "bytes": int(tensor.n_bytes) // len(modules)}
        for module in modules:
            sites[module] = {**rows.pop(module, {}), **told}
    return {
        "path": path,
        "model_type": arch,
        "format": "gguf",
        "files": 1,
        "dtypes": dict(dtypes.most_common()),
        "sites": {**sites, **rows},
        "unquantized": unquantized,
        "extras": {},
        "record": record,
    }
