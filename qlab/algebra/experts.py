"""A mixture of experts as operations of a traced program: where tokens go, and one product per
expert.

All fused mixtures of transformers run `experts_forward`, so that they trace to the same two
operations on every device. Legend: n tokens, t choices per token, s = n t pairs of token and expert
in the order of experts, e experts, ends [e] where each expert's rows end.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """The inputs x [..., k] of the sites of a source. Rows x [s, k] that belong to experts have the
    token of each row [s], and the ends."""

    x: Tensor
    tokens: Tensor | None = None
    ends: Tensor | None = None


def rows_of(ends: Tensor) -> Iterator[slice]:
    """The rows of every expert, in order."""
    start = 0
    for end in ends.tolist():
        yield slice(start, end)
        start = end


def reaching(rows: Rows, experts: slice) -> Rows:
    """The rows of these experts alone."""
    assert rows.tokens is not None and rows.ends is not None
    parts = list(rows_of(rows.ends))[experts]
    part = slice(parts[0].start, parts[-1].stop)
    return Rows(rows.x[part], rows.tokens[part], rows.ends[experts] - part.start)


def each_expert(x_sk: Tensor, ends: Tensor, product: Callable[[int, Tensor], Tensor]) -> Tensor:
    """product(e, rows of expert e) for all experts, one below the other."""
    if torch.is_grad_enabled():
        return torch.cat([product(e, x_sk[rows]) for e, rows in enumerate(rows_of(ends))])
    out_so = None
    for e, rows in enumerate(rows_of(ends)):
        y_no = product(e, x_sk[rows])
        out_so = y_no.new_empty(len(x_sk), y_no.shape[-1]) if out_so is None else out_so
        out_so[rows] = y_no
        del y_no  # a small tensor behind large ones keeps malloc from giving their memory again
    assert out_so is not None
    return out_so


def per_row(m_ek: Tensor, ends: Tensor, rows: int) -> Tensor:
    """[e, k] -> [s, k]: the row of its expert for each of s rows. Since `rows` says how many there
    are, the host of a GPU need not wait for `ends`."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    return m_ek.repeat_interleave(counts, 0, output_size=rows)


@torch.library.custom_op("qlab::route", mutates_args=())
def route(chosen_nt: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(pairs, tokens, ends): numbers [s] of the pairs in chosen_nt.flatten() by expert, their
    tokens [s], and ends [e]."""
    chosen = chosen_nt.flatten()
    pairs = chosen.argsort(stable=True)
    # bincount would make the host of a GPU wait
    counts = chosen.new_zeros(experts).scatter_add_(0, chosen, torch.ones_like(chosen))
    return pairs, pairs // chosen_nt.shape[1], counts.cumsum(0)


@torch.library.custom_op("qlab::route_everywhere", mutates_args=())
def route_everywhere(chosen_nt: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`route` if every token went to every expert. It serves statistics, which need no weights of
    the choice."""
    n = len(chosen_nt)
    tokens = torch.arange(n, device=chosen_nt.device).repeat(experts)
    pairs = torch.arange(n * experts, device=chosen_nt.device)
    ends = torch.arange(1, experts + 1, device=chosen_nt.device) * n
    return pairs, tokens, ends


@route.register_fake
@route_everywhere.register_fake
def _(chosen_nt: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    pairs = chosen_nt.new_empty(chosen_nt.numel(), dtype=torch.long)
    return pairs, torch.empty_like(pairs), chosen_nt.new_empty(experts, dtype=torch.long)


@torch.library.custom_op(
    "qlab::experts_linear", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def experts_linear(x_sk: Tensor, W_eok: Tensor, bias_eo: Tensor | None, ends: Tensor) -> Tensor:
    """x W_e^T + b_e for the rows of each expert e: [s, o]."""

    def product(e: int, x_nk: Tensor) -> Tensor:
        return F.linear(x_nk, W_eok[e], None if bias_eo is None else bias_eo[e])

    return each_expert(x_sk, ends, product)


@experts_linear.register_fake
def _(x_sk: Tensor, W_eok: Tensor, bias_eo: Tensor | None, ends: Tensor) -> Tensor:
    return x_sk.new_empty(x_sk.shape[0], W_eok.shape[1])


@torch.library.custom_op(
    "qlab::experts_matmul", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def experts_matmul(x_sk: Tensor, W_eko: Tensor, bias_eo: Tensor | None, ends: Tensor) -> Tensor:
    """x W_e + b_e for the rows of each expert e, of weights that are stored transposed: [s, o]."""

    def product(e: int, x_nk: Tensor) -> Tensor:
        return F.linear(x_nk, W_eko[e].mT, None if bias_eo is None else bias_eo[e])

    return each_expert(x_sk, ends, product)


@experts_matmul.register_fake
def _(x_sk: Tensor, W_eko: Tensor, bias_eo: Tensor | None, ends: Tensor) -> Tensor:
    return x_sk.new_empty(x_sk.shape[0], W_eko.shape[2])


@torch.library.custom_op("qlab::experts_outer", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def experts_outer(g_so: Tensor, x_sk: Tensor, ends: Tensor) -> Tensor:
    """The sum of g^T x over the rows of each expert: [e, o, k]."""
    return torch.stack([g_so[rows].mT @ x_sk[rows] for rows in rows_of(ends)])


@experts_outer.register_fake
def _(g_so: Tensor, x_sk: Tensor, ends: Tensor) -> Tensor:
    return x_sk.new_empty(len(ends), g_so.shape[1], x_sk.shape[1])


def _save_experts(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x_sk, W, bias, ends = inputs
    ctx.save_for_backward(x_sk, W, ends)
    ctx.experts = None if bias is None else len(bias)


def _bias_gradient(ctx: Any, g_so: Tensor, ends: Tensor) -> Tensor | None:
    if ctx.experts is None:
        return None
    owner = per_row(torch.arange(ctx.experts, device=ends.device), ends, len(g_so))
    return g_so.new_zeros(ctx.experts, g_so.shape[1]).index_add(0, owner, g_so)


def _experts_linear_gradients(ctx: Any, g_so: Tensor) -> tuple:
    x_sk, W_eok, ends = ctx.saved_tensors
    g_x = experts_matmul(g_so, W_eok, None, ends)
    g_W = experts_outer(g_so, x_sk, ends) if ctx.needs_input_grad[1] else None
    return g_x, g_W, _bias_gradient(ctx, g_so, ends), None


def _experts_matmul_gradients(ctx: Any, g_so: Tensor) -> tuple:
    x_sk, W_eko, ends = ctx.saved_tensors
    g_x = experts_linear(g_so, W_eko, None, ends)
    g_W = experts_outer(x_sk, g_so, ends) if ctx.needs_input_grad[1] else None
    return g_x, g_W, _bias_gradient(ctx, g_so, ends), None


experts_linear.register_autograd(_experts_linear_gradients, setup_context=_save_experts)
experts_matmul.register_autograd(_experts_matmul_gradients, setup_context=_save_experts)


# operation -> layout of its weight
EXPERT_OPS: Mapping[Any, str] = {
    torch.ops.qlab.experts_linear.default: "e o k",
    torch.ops.qlab.experts_matmul.default: "e k o",
}


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of a module of fused experts, as transformers' experts interface calls it: [n, k]
    -> [n, k].

    A weight may be a module that stands in for the tensor. It is called with (x [s, k], bias [e, o]
    or None, ends).
    """

    def product(name: str, x_sk: Tensor) -> Tensor:
        weight = getattr(self, name)
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        if isinstance(weight, nn.Module):
            return weight(x_sk, bias, ends)
        op = torch.ops.qlab.experts_matmul if self.is_transposed else torch.ops.qlab.experts_linear
        return op(x_sk, weight, bias, ends)

    pairs, tokens, ends = torch.ops.qlab.route(top_k_index, len(self.down_proj))
    x_sk = hidden_states[tokens]
    if getattr(self, "has_gate", True):  # before transformers 5.3 all have one
        x_sk = self._apply_gate(product("gate_up_proj", x_sk))
    else:
        x_sk = self.act_fn(product("up_proj", x_sk))
    y_sk = product("down_proj", x_sk)
    if getattr(self, "has_post_expert_norm", False):  # transformers 5.17 does not know it
        y_sk = self.post_expert_norm(y_sk)
    # Routers of transformers 5.0.0 give a weight to every expert: [n, e].
    of_all_experts = top_k_weights.shape != top_k_index.shape
    weights_nt = top_k_weights.gather(1, top_k_index) if of_all_experts else top_k_weights
    y_sk = y_sk * weights_nt.reshape(-1)[pairs].unsqueeze(-1)
    y_ntk = y_sk[pairs.argsort()].unflatten(0, tuple(top_k_index.shape))
    return y_ntk.sum(1).to(hidden_states.dtype)
