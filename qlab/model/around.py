"""What lies around the blocks as a segment: the embedding in front of the first and the head behind
the last.

Its program takes token ids and the hidden states that leave the last block, and gives the hidden
states that enter the first, the logits, and what blocks are called with beside hidden states. It is
traced with stand-ins in the places of the blocks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qlab.algebra.graph import Code, ModuleGraph
from qlab.algebra.qtensor import Leaf, dense
from qlab.algebra.random import generator
from qlab.algebra.tracing.taken_apart import take_apart
from qlab.algebra.tracing.trace import trace
from qlab.algebra.wires import wires
from qlab.errors import QlabError
from qlab.model.calls import Call
from qlab.model.loading import drop_outside, load_outside, put
from qlab.model.paper import dtype_in
from qlab.model.recording import Replaced
from qlab.model.running import record_blocks
from qlab.model.skeleton import Skeleton

NAME = "what lies around the blocks"
TOKENS = (2, 8)  # windows, and tokens in each, of the example that it is traced on


class _StandIn(nn.Module):
    """Hands hidden states on in the place of a block, and notes what it is called with."""

    def __init__(self, block: nn.Module, code: Code, call: Call, leaving: int):
        super().__init__()
        # functions, which are not copied with the module
        self.of_block = lambda name: getattr(block, name)
        self.returned = lambda outputs: pytree.tree_unflatten(outputs, code.out_spec)
        self.results, self.leaving = code.out_spec.num_leaves, leaving
        self.at = next(i for i, place in call.holes.items() if place == 0)
        self.forget()

    def forget(self) -> None:
        """Let go of what it was called with and of what it is to return."""
        self.hidden: Tensor | None = None
        self.beside: list[Tensor] = []
        self.replay: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """An attribute of the block: models read some, such as attention_type."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return object.__getattribute__(self, "of_block")(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, _ = take_apart((args, dict(sorted(kwargs.items()))))
        self.hidden, self.beside = leaves[self.at], [t for t in leaves if isinstance(t, Tensor)]
        hidden = leaves[self.at] if self.replay is None else self.replay
        outputs: list[Any] = [None] * self.results
        outputs[self.leaving] = hidden
        return self.returned(outputs)


class _Around(nn.Module):
    """A model with stand-ins in the places of its blocks, as a function of token ids and of the
    hidden states that leave the last block."""

    def __init__(self, model: nn.Module, prefix: str):
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.prefix = prefix
        self.model_of_it = (model,)  # a tuple, so that it is no child and names stay as they are

    def forward(self, ids: Tensor, hidden: Tensor) -> Any:
        stand_ins: Sequence[Any] = list(self.get_submodule(self.prefix).children())
        stand_ins[-1].replay = hidden
        logits = self.model_of_it[0](input_ids=ids, use_cache=False).logits
        entering = stand_ins[0].hidden
        passed = {id(stand_in.hidden) for stand_in in stand_ins}
        beside = {id(t): t for stand_in in stand_ins for t in stand_in.beside}
        for stand_in in stand_ins:
            stand_in.forget()
        others = [t for key, t in beside.items() if key not in passed]
        return entering, logits, others


def around_code(skeleton: Skeleton) -> Code:
    """The program of what lies around the blocks, traced once.

    Refuses a model whose blocks hand on more than hidden states, and one that cannot be traced.
    """
    if skeleton.programs.around is None:
        load_outside(skeleton, with_head=False)
        hidden, calls = record_blocks(skeleton, torch.zeros(TOKENS, dtype=torch.long))
        drop_outside(skeleton)
        skeleton.programs.around = _traced(skeleton, hidden, calls)
    return skeleton.programs.around


def load_around(skeleton: Skeleton) -> ModuleGraph:
    """What lies around the blocks as a value, with its leaves loaded from the files onto the
    skeleton's device, all of them dense."""
    code, names = around_code(skeleton), skeleton.names
    buffers = dict(skeleton.model.named_buffers(remove_duplicate=False))
    leaves: dict[str, Leaf] = {}
    for name in dict.fromkeys(code.params.values()):
        if name in buffers and names.stored_buffer(name) is None:
            leaves[name] = buffers[name].to(skeleton.device)
        else:
            leaf = skeleton.checkpoint.leaf(names.file_name(source_of(skeleton, name)))
            leaves[name] = dense(leaf, skeleton.checkpoint.dtype).to(skeleton.device)
    dtypes = {name: leaf.dtype for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    running = {name: dtype_in(skeleton.model, name) for name in dtypes}
    common = skeleton.checkpoint.dtype
    return ModuleGraph(
        code,
        leaves,
        dtype=common,
        stored={name: dtype for name, dtype in dtypes.items() if dtype != common},
        held={name: dtype for name, dtype in running.items() if dtype != dtypes[name]},
    )


def call_around(skeleton: Skeleton) -> Call:
    """A call of what lies around the blocks with a few tokens. What leaves are the hidden states
    that enter the first block, and the logits."""
    code = around_code(skeleton)
    entering = next(n for n in code.graph.nodes if n.name == wires(code)["enter"].node)
    shape = [n.node.hint if isinstance(n, torch.SymInt) else n for n in entering.meta["val"].shape]
    hidden = torch.empty(shape, dtype=skeleton.dtype, device="meta")
    size = skeleton.checkpoint.config.get_text_config().vocab_size
    ids = torch.randint(size, TOKENS, generator=generator(0, "tokens"))
    leaves, form = take_apart(((ids, hidden), {}))
    return Call(
        leaves=(leaves[0], None), form=form, holes={1: 0}, entering=(hidden,), passes=(1, 2)
    )


def source_of(skeleton: Skeleton, name: str) -> str:
    """The parameter that the files hold for one around the blocks: itself, or the one that it is
    tied to."""
    names = skeleton.names
    return name if names.is_spelled(name) else names.tied.get(name, name)


def _traced(skeleton: Skeleton, hidden: Tensor, calls: Mapping[str, Call]) -> Code:
    stand_ins = []
    for path, call in calls.items():
        if len(call.entering) > 1 or call.passes[0] == 0:
            raise QlabError(
                f"{path} hands on more than hidden states, which qlab does not follow around the "
                "blocks"
            )
        code = skeleton.programs.code(path, call)
        stand_ins.append(_StandIn(skeleton.blocks[path], code, call, call.passes[0] - 1))
    for name in skeleton.names.tied:  # gives it a place of its own
        put(skeleton.model, name, skeleton.model.get_parameter(name).clone())
    example = torch.zeros(TOKENS, dtype=torch.long), hidden.to("meta")
    with Replaced(skeleton.model, skeleton.prefix, stand_ins):
        return trace(_Around(skeleton.model, skeleton.prefix), example, {}, NAME).code
