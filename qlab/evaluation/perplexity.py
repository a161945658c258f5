"""Perplexity, KL divergence and top-1 agreement against a reference, with intervals over windows.

Both models are streamed block by block through `interpret`, so neither has to fit in memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.data.calibration import Tokens, generator
from qlab.driver.batches import in_batches, push, record
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.model.calls import windows_axis
from qlab.model.headers import refuse_missing
from qlab.model.loading import load_block, load_outside
from qlab.model.running import check_length, head
from qlab.model.skeleton import Skeleton
from qlab.model.uncounted import refuse_uncounted
from qlab.process.progress import progress
from qlab.process.shown import Shown, interval
from qlab.process.surroundings import undisturbed

RESAMPLES = 2000


@dataclass(frozen=True)
class Reading:
    """A model's final hidden states on all windows, and those after every block on the first one.

    hidden: [n, l, d], or with an axis of streams more; windows: the axis of the n windows.
    trail: [b, ...], the same without that axis.
    """

    skeleton: Skeleton
    hidden: Tensor
    trail: Tensor
    windows: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """(windows, tokens in each)."""
        return tuple(self.hidden.shape[self.windows : self.windows + 2])


@dataclass(frozen=True, repr=False, kw_only=True)
class Evaluation(Shown):
    """Means over all predicted tokens, in nats; `_ci` are 95 % bootstrap intervals over windows.

    perplexity = exp(mean NLL). kl = mean KL(reference || model). top1_agreement: the share of
    tokens on which both models predict the same. ratio_ci: the paired interval of perplexity /
    reference_perplexity. layer_error: relative error |h - h_ref| / |h_ref| of the hidden states
    after every block, on the first window.
    """

    perplexity: float
    perplexity_ci: tuple[float, float]
    reference_perplexity: float
    ratio_ci: tuple[float, float]
    kl: float
    kl_ci: tuple[float, float]
    top1_agreement: float
    top1_ci: tuple[float, float]
    windows: int
    length: int
    predictions: int
    layer_error: tuple[float, ...]

    def summary(self) -> dict[str, str]:
        """Every figure with its interval."""
        ratio = self.perplexity / self.reference_perplexity
        return {
            "perplexity": interval(self.perplexity, self.perplexity_ci),
            "reference perplexity": f"{self.reference_perplexity:.4f}",
            "perplexity / reference": interval(ratio, self.ratio_ci),
            "KL divergence (nats)": interval(self.kl, self.kl_ci),
            "top-1 agreement": interval(self.top1_agreement, self.top1_ci),
            "over": (
                f"{self.windows} windows of {self.length} tokens, {self.predictions:,} predictions"
            ),
        }

    def json(self) -> dict[str, Any]:
        """The evaluation as plain data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}


@dataclass(frozen=True, repr=False, kw_only=True)
class Perplexity(Shown):
    """exp(mean NLL) over all predicted tokens of windows, in nats, with its 95 % bootstrap interval
    over windows."""

    perplexity: float
    perplexity_ci: tuple[float, float]
    windows: int
    length: int
    predictions: int

    def summary(self) -> dict[str, str]:
        """The figure with its interval."""
        return {
            "perplexity": interval(self.perplexity, self.perplexity_ci),
            "over": (
                f"{self.windows} windows of {self.length} tokens, {self.predictions:,} predictions"
            ),
        }

    def json(self) -> dict[str, Any]:
        """The perplexity as plain data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}


@undisturbed
@torch.no_grad()
def read(
    model: Checkpoint, data: Tokens, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Reading:
    """Run the model on all windows, one block in memory at a time; the head stays loaded for what
    follows.

    Warns where the model's readers round keys and values, which qlab does not.
    """
    model.warn_unapplied()
    skeleton = Skeleton(model, dtype, device)
    refuse_missing(skeleton.names)
    refuse_uncounted(skeleton)
    check_length(skeleton, data.longest)
    load_outside(skeleton, with_head=True)
    windows = in_batches(data)
    states, calls = record(skeleton, windows)
    axis = windows_axis(states[0][0], windows[0]["input_ids"].shape)
    trail = []
    for path in progress(list(skeleton.blocks), f"reading {model.path.name}"):
        graph = load_block(skeleton, path, calls[0][path])
        states = list(push(graph, ((call[path], h) for call, h in zip(calls, states))))
        trail.append(states[0][0].select(axis, 0).cpu())
    return Reading(
        skeleton=skeleton,
        hidden=torch.cat([hidden for (hidden,) in states], axis),
        trail=torch.stack(trail),
        windows=axis,
    )


@undisturbed
@torch.no_grad()
def evaluate(
    model: Checkpoint | Reading, against: Checkpoint | Reading, data: Tokens, device: str = "cpu"
) -> Evaluation:
    """How far `model` is from the reference `against` on windows of tokens (see Evaluation), in
    fp32, a block at a time on `device`.

    Errors: models whose vocabularies, blocks or hidden sizes differ, windows longer than their
    positions, readings of other tokens.
    """
    if data.ids.shape[1] < 2:
        raise QlabError(
            f"windows of {data.ids.shape[1]} token predict nothing; give a length of at least 2"
        )
    _check_vocabularies(model, against)
    ours = model if isinstance(model, Reading) else read(model, data, device=device)
    theirs = against if isinstance(against, Reading) else read(against, data, device=device)
    if not ours.tokens == theirs.tokens == tuple(data.ids.shape):
        raise QlabError(
            f"the readings were made on windows {ours.tokens} and {theirs.tokens}, "
            f"not on these {tuple(data.ids.shape)}; read both on the same tokens"
        )
    if ours.trail.shape != theirs.trail.shape:
        (a, *_, d), (b, *_, e) = ours.trail.shape, theirs.trail.shape
        raise QlabError(
            f"{_path(ours)} has {a} blocks of hidden size {d} and the reference {_path(theirs)} "
            f"has {b} of {e}; compare a model with the one that it was made from"
        )
    per_window = [_window(ours, theirs, data.ids, i) for i in range(len(data.ids))]
    nll, nll_ref, kl, top1 = (
        torch.stack([w[k] for w in per_window]) for k in ("nll", "nll_ref", "kl", "top1")
    )
    error = (ours.trail - theirs.trail).flatten(1).norm(dim=1) / theirs.trail.flatten(1).norm(
        dim=1
    ).clamp_min(1e-30)
    predictions = data.ids.shape[1] - 1
    return Evaluation(
        perplexity=float(nll.mean().exp()),
        perplexity_ci=_interval(nll, torch.exp),
        reference_perplexity=float(nll_ref.mean().exp()),
        ratio_ci=_interval(nll - nll_ref, torch.exp),
        kl=float(kl.mean()),
        kl_ci=_interval(kl),
        top1_agreement=float(top1.mean()),
        top1_ci=_interval(top1),
        windows=len(data.ids),
        length=data.ids.shape[1],
        predictions=predictions * len(data.ids),
        layer_error=tuple(float(e) for e in error),
    )


@undisturbed
@torch.no_grad()
def perplexity(model: Checkpoint | Reading, data: Tokens, device: str = "cpu") -> Perplexity:
    """How well `model` predicts windows of tokens, beside no reference, in fp32, a block at a time
    on `device`.

    Errors: windows longer than the model's positions, a reading of other tokens.
    """
    ours = model if isinstance(model, Reading) else read(model, data, device=device)
    found = evaluate(ours, ours, data)
    return Perplexity(
        perplexity=found.perplexity,
        perplexity_ci=found.perplexity_ci,
        windows=found.windows,
        length=found.length,
        predictions=found.predictions,
    )


def _check_vocabularies(model: Checkpoint | Reading, against: Checkpoint | Reading) -> None:
    sizes = [
        (m.skeleton.checkpoint if isinstance(m, Reading) else m).config.get_text_config().vocab_size
        for m in (model, against)
    ]
    if sizes[0] != sizes[1]:
        raise QlabError(
            f"{_path(model)} has a vocabulary of {sizes[0]} tokens and the reference "
            f"{_path(against)} one of {sizes[1]}; compare a model with the one that it was made "
            "from"
        )


def _path(model: Checkpoint | Reading) -> Path:
    return (model.skeleton.checkpoint if isinstance(model, Reading) else model).path


def _window(ours: Reading, theirs: Reading, ids: Tensor, i: int) -> Mapping[str, Tensor]:
    tokens, targets = ids[i : i + 1], ids[i, 1:]
    log_p = _log_probabilities(theirs, tokens, i)
    log_q = log_p if ours is theirs else _log_probabilities(ours, tokens, i)
    return {
        "nll": F.nll_loss(log_q, targets).double(),
        "nll_ref": F.nll_loss(log_p, targets).double(),
        "kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().mean(),
        "top1": (log_q.argmax(-1) == log_p.argmax(-1)).double().mean(),
    }


def _log_probabilities(reading: Reading, tokens: Tensor, i: int) -> Tensor:
    """log softmax of the logits that predict tokens 1 .. l-1: [l - 1, vocabulary]."""
    logits = head(reading.skeleton, tokens, reading.hidden.narrow(reading.windows, i, 1))[0, :-1]
    if not torch.isfinite(logits).all():
        raise QlabError(
            f"{reading.skeleton.checkpoint.path} predicts NaN or Inf in window {i}; its weights "
            "are damaged"
        )
    return logits.float().log_softmax(-1).cpu()


def _interval(values: Tensor, through: Any = lambda t: t) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean over windows, passed through a monotone function."""
    picks = torch.randint(
        len(values), (RESAMPLES, len(values)), generator=generator(0, "bootstrap")
    )
    means = through(values[picks].mean(1))
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype))
    return float(low), float(high)
