"""Queries, keys and values of a lowered model that are turned, shifted and rounded where attention
reads them.

    attention(q, k, v) -> g(attention(f(q), f(k), f(v)))

The rows of f and g are tokens, and their columns the channels of all heads. transformers hands what
an attention reads to the function that the configuration names: behind rotary positions and the
cache, and before keys and values are repeated for the queries that share them. The functions here
stand around torch's, around that of single tokens, and around those that are written out.

Every token is rounded by itself, so that a token becomes the same numbers in every step, and no
number is rounded twice. A cache that holds codes (one that `decodes`) did all of f when a token was
written; of others each step rounds all that it reads.

f and g are said of all heads. An attention that knows its `ranks` has some of the heads, and does
what is said of these (`qlab.lowering.around.divided`).
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from qlab.algebra.graph import ModuleGraph, Op
from qlab.algebra.online import MatMul, QuantizeClipped, QuantizeInput, Subtract
from qlab.algebra.wires import full_name
from qlab.errors import QlabError, warn
from qlab.files.checkpoint import Checkpoint
from qlab.lowering.around import attention as one_token
from qlab.lowering.around.coded_layer import decoded_of
from qlab.lowering.around.coded_tokens import Coder
from qlab.lowering.around.coded_tokens import refusal as refusal_as_codes
from qlab.lowering.around.divided import Ends, of_rank
from qlab.lowering.around.hadamard import rotation
from qlab.lowering.around.inputs import RoundedInput
from qlab.model.skeleton import Skeleton

# Attention module -> "query", "key", "value" or "output" -> the operations on it, in order.
Attended = Mapping[str, Mapping[str, tuple[Op, ...]]]
KINDS = ("query", "key", "value")
OUTPUT = "output"
PREFIX = "qlab_rounded_"


class Shifted(nn.Module):
    """x [n, k] -> x - c, as `Subtract` computes it."""

    c: Tensor

    def __init__(self, c: Tensor):
        super().__init__()
        self.register_buffer("c", c, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.c.dtype) - self.c).to(x.dtype)


class OfHeads(nn.Module):
    """x [b, h, n, d] -> x behind operations on its rows [b * n, h * d]. where: its name in the
    model."""

    def __init__(self, where: str, ops: tuple[Op, ...], device: torch.device):
        super().__init__()
        self.where = where
        self.steps = nn.ModuleList(_module(op, device) for op in ops)
        self.columns = next((columns for columns in map(_columns, ops) if columns), None)
        self.scales = next((scales for scales in map(_heads, ops) if scales), 1)

    def forward(self, x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        if self.scales not in (1, h) or (self.columns and (h * d) % self.columns):
            raise QlabError(
                f"{self.where} has {h} heads of {d} channels here, and is rounded as {self.scales} "
                f"heads or in groups of {self.columns}; evaluate the directory with qlab"
            )
        rows = x.transpose(1, 2).reshape(b * n, h * d)
        for step in self.steps:
            rows = step(rows)
        return rows[:, : h * d].view(b, n, h, d).transpose(1, 2)


def attend(model: PreTrainedModel, attended: Attended, device: torch.device) -> None:
    """Let the attentions of a model do it, which have to be among `attentions`, and do nothing
    else that was said before."""
    found = {name: ops for name, ops in attended.items() if ops}
    if not found:
        return
    implementation = str(model.config._attn_implementation)
    around = PREFIX + implementation.removeprefix(PREFIX)
    if around not in AROUND:
        raise QlabError(
            f"{next(iter(found))} rounds what attention reads, which qlab does around the "
            f"attention implementations sdpa and eager, not {implementation}; load the model with "
            "attn_implementation='sdpa'"
        )
    model.set_attn_implementation(around)
    keep_written_out(model)
    for name, by_kind in found.items():
        module: Any = model.get_submodule(name)
        here = {kind: _here(module, kind, ops) for kind, ops in by_kind.items()}
        reads = {kind: OfHeads(f"{name}:{kind}", ops, device) for kind, ops in here.items()}
        if not hasattr(module, "reads"):
            module.register_forward_pre_hook(_before, with_kwargs=True)
        module.reads, module.decoded = nn.ModuleDict(reads), ()
    modules: list[Any] = [model.get_submodule(name) for name in found]
    # fewer than there are blocks, where some read keys and values of others
    layers = len(DynamicCache(config=model.config).layers)
    has_own = all(getattr(module, "layer_idx", layers) < layers for module in modules)
    for module in modules:
        module.coders = _coders(module) if has_own else {}


def _here(module: Any, kind: str, ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """The operations on the heads that an attention has here."""
    ranks, channels = getattr(module, "ranks", None), channels_of(module)
    if ranks is None:
        return ops
    of_head = channels["value" if kind == OUTPUT else kind]
    return tuple(part for op in ops for part in of_rank(op, ranks, of_head))


def _coders(module: Any) -> dict[str, Coder]:
    """What keys and values become that a cache may hold as codes, both or none."""
    steps = {kind: module.reads[kind].steps for kind in KINDS[1:] if kind in module.reads}
    channels = channels_of(module)
    fit = {kind: refusal_as_codes(steps[kind], channels[kind]) is None for kind in steps}
    if not (len(fit) == 2 and all(fit.values())):
        return {}
    heads = key_heads_of(module)
    return {kind: Coder(steps[kind], channels[kind], heads) for kind in steps}


def keep_written_out(model: PreTrainedModel) -> None:
    """Let every attention have the function that is written out in its file, as `written_out`."""
    for name in attentions(model):
        module: Any = model.get_submodule(name)
        # the forward functions of a file hand this one to the interface as the default
        module.written_out = _forward(module).__globals__.get("eager_attention_forward")


def attended_in(skeleton: Skeleton) -> Attended:
    """What a directory says of what its attentions read. Warns of attentions that no operation can
    be put in front of."""
    model, extras = skeleton.model, [e for e in skeleton.checkpoint.extras if e.attended]
    if not extras:
        return {}
    can = model._can_set_attn_implementation()
    inside = tuple(f"{path}." for path in skeleton.blocks)
    reached = [name for name in attentions(model) if can and name.startswith(inside)]
    attended = {
        name: _said(skeleton, name, channels_of(model.get_submodule(name))) for name in reached
    }
    unreached = [name for name in others(model, reached) if name.startswith(inside)]
    left = [name for name in unreached if _said(skeleton, name, dict.fromkeys(KINDS, 1))]
    seen = {spelling for name in reached for spelling in skeleton.names.spellings_of(name)}
    owners = {tensor.rpartition(".")[0] for extra in extras for tensor in extra.tensors}
    hidden = sorted({*left, *(owners - seen if any(e.applied for e in extras) else ())})
    if hidden:
        says = "; ".join(extra.says for extra in extras if extra.applied)
        warn(
            f"{skeleton.checkpoint.path}: {says}, which lowered modules do not do in "
            f"{', '.join(hidden)}, whose attention transformers runs in code of its own: it "
            "computes with keys and values as they are; evaluate the directory with qlab"
        )
    return attended


def warn_unread(checkpoint: Checkpoint, attended: Attended) -> None:
    """Warn of a dense model, which reads keys and values as they are, where a directory rounds
    them."""
    if any(attended.values()):
        says = "; ".join(extra.says for extra in checkpoint.extras if extra.attended)
        warn(
            f"{checkpoint.path}: {says}, which a dequantized model does not do: it computes with "
            "keys and values as they are"
        )


def attended_of(model: PreTrainedModel, graph: ModuleGraph) -> Attended:
    """What a solved block does to what its attentions read; refuses what no lowered module does."""
    reached = attentions(model) if model._can_set_attn_implementation() else ()
    found: dict[str, dict[str, tuple[Op, ...]]] = {}
    for name, ops in graph.online_values.items():
        owner, _, kind = full_name(graph.path, name).rpartition(":")
        reasons = [reason for reason in map(refusal, ops) if reason]
        if owner not in reached or kind not in KINDS or reasons:
            raise QlabError(
                f"{full_name(graph.path, name)} still needs {', '.join(reasons) or 'an operation'} "
                "at run time, which lowered modules do not do there; evaluate the value of "
                "qlab.apply instead"
            )
        found.setdefault(owner, {})[kind] = ops
    return found


def _said(
    skeleton: Skeleton, module: str, channels: Mapping[str, int]
) -> Mapping[str, tuple[Op, ...]]:
    """The operations on what a module reads, by either spelling of its name."""
    found: dict[str, tuple[Op, ...]] = {}
    for name in skeleton.names.spellings_of(module):
        found |= skeleton.checkpoint.attended(name, channels)
    return found


def attentions(model: nn.Module) -> tuple[str, ...]:
    """The modules of a model that hand what they read to the attention that its configuration
    names."""
    return tuple(name for name, module in model.named_modules() if _asks(module))


def others(model: nn.Module, reached: Collection[str]) -> tuple[str, ...]:
    """The modules that are attentions by the names of their classes, and neither are among those
    reached nor have one inside."""
    return tuple(
        name
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower()
        and not any(f"{other}.".startswith(f"{name}.") for other in reached)
    )


def channels_of(module: nn.Module) -> dict[str, int]:
    """How many channels a head has of what an attention reads, by kind. An attention with heads of
    keys and of values of their own sizes has both beside the common one."""
    config: Any = module.config
    common = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
    common = common or config.hidden_size // config.num_attention_heads
    scored = getattr(module, "qk_head_dim", None) or common
    mixed = getattr(module, "v_head_dim", None) or common
    return {"query": scored, "key": scored, "value": mixed}


def key_heads_of(module: nn.Module) -> int:
    """How many heads of keys and values an attention reads here. What is cached in another number
    is something else: a latent, of which it makes them."""
    config: Any = module.config
    heads = getattr(module, "num_key_value_heads", None)
    heads = heads or getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    ranks = getattr(module, "ranks", None)
    return heads if ranks is None else heads // ranks.world


def refusal(op: Op) -> str | None:
    """Why an operation cannot be run on what attention reads, or None."""
    if isinstance(op, QuantizeInput):
        is_fixed = op.scales is not None or op.spec.tile.rows == 1
        return None if is_fixed else f"a scale of several tokens ({op.spec})"
    known = isinstance(op, MatMul | Subtract | QuantizeClipped)
    return None if known else f"a {type(op).__name__}"


def _module(op: Op, device: torch.device) -> nn.Module:
    """The module of an operation that is not refused."""
    if isinstance(op, Ends):
        return op
    if isinstance(op, MatMul):
        return rotation(op.M_nn, device)
    if isinstance(op, Subtract):
        return Shifted(op.c_k.to(device))
    assert isinstance(op, QuantizeInput | QuantizeClipped)
    return RoundedInput(op, device, persistent=False)


def _columns(op: Op) -> int | None:
    """How many channels have a scale or a matrix together, where not all have."""
    if isinstance(op, QuantizeInput | QuantizeClipped):
        return op.spec.tile.cols
    return op.M_nn.shape[-1] if isinstance(op, MatMul) else None


def _heads(op: Op) -> int | None:
    """How many heads have stored scales of their own."""
    if not isinstance(op, QuantizeInput) or op.scales is None or op.spec.tile.cols is None:
        return None
    return op.scales.shape[-1]


def _forward(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def _asks(module: nn.Module) -> bool:
    code = getattr(_forward(module), "__code__", None)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(code, "co_names", ())


def _before(module: Any, args: tuple, more: dict[str, Any]) -> None:
    """Note which of keys and values a cache gives back as they were rounded. Refuse to run where
    somebody has named another attention since."""
    implementation = module.config._attn_implementation
    if not str(implementation).startswith(PREFIX):
        raise QlabError(
            f"the attention implementation is {implementation}, which does not round keys and "
            "values as the model's directory says; leave it as qlab has set it, or name it when "
            "the model is loaded"
        )
    cache = next((a for a in (*args, *more.values()) if isinstance(a, Cache)), None)
    module.decoded = ()
    if cache is not None:
        coders = module.coders if hasattr(module, "reads") else {}
        module.decoded = decoded_of(cache, module.layer_idx, coders)


def _around(plain: Callable[..., Any]) -> Callable[..., Any]:
    """An attention that reads what the operations of the module make of queries, keys and
    values."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any
    ) -> Any:
        reads: Any = getattr(module, "reads", None)
        if reads is None:
            return plain(module, query, key, value, *args, **more)
        decoded: Any = module.decoded
        query = reads["query"](query) if "query" in reads else query
        key = reads["key"](key) if "key" in reads and "key" not in decoded else key
        value = reads["value"](value) if "value" in reads and "value" not in decoded else value
        y, weights = plain(module, query, key, value, *args, **more)
        if OUTPUT in reads:  # [b, n, h, d]
            y = reads[OUTPUT](y.transpose(1, 2)).transpose(1, 2)
        return y, weights

    return attention


def written_out(module: Any, *args: Any, **more: Any) -> Any:
    """The attention that the file of the module has itself."""
    return module.written_out(module, *args, **more)


# Name of an implementation -> the attention, and the form of its mask.
AROUND: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    f"{PREFIX}sdpa": (_around(sdpa_attention_forward), sdpa_mask),
    f"{PREFIX}{one_token.NAME}": (_around(one_token.attention), sdpa_mask),
    f"{PREFIX}eager": (_around(written_out), eager_mask),
}


# Registered by importing this module, so that a model that was pickled finds them in another
# process.
for _name, (_attention, _mask) in AROUND.items():
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _mask)
