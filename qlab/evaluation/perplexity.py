"""Perplexity, KL divergence and top-1 agreement with a reference, with intervals over windows.

Models run one block at a time, so that neither has to fit in memory.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.qtensor import dense
from qlab.data.calibration import Tokens
from qlab.driver.apply import Quantized
from qlab.driver.batches import in_batches, push, record
from qlab.driver.writing import as_read
from qlab.errors import QlabError
from qlab.evaluation.figures import Evaluation as Evaluation
from qlab.evaluation.figures import Perplexity as Perplexity
from qlab.evaluation.overlap import calibration_overlap
from qlab.evaluation.statistics import bootstrap, mcnemar, quantiles
from qlab.files.checkpoint import Checkpoint
from qlab.model.calls import Call, windows_axis
from qlab.model.headers import refuse_missing
from qlab.model.loading import load_block, load_outside, put
from qlab.model.running import check_length, head
from qlab.model.skeleton import Skeleton
from qlab.model.uncounted import refuse_uncounted
from qlab.process.progress import progress
from qlab.process.surroundings import undisturbed


@dataclass(frozen=True)
class Reading:
    """What a model computes on n windows of l tokens each: its final hidden states.

    hidden: [n, l, d], or with one more axis of streams. trail: the hidden states of the first
    window after each of b blocks, [b, l, d]. windows: the axis of the windows in `hidden`. stages:
    the names of the steps that the model was read behind.
    """

    skeleton: Skeleton
    hidden: Tensor
    trail: Tensor
    windows: int
    stages: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """(windows, tokens in each)."""
        return tuple(self.hidden.shape[self.windows : self.windows + 2])


@undisturbed
@torch.no_grad()
def read(
    model: Checkpoint | Quantized,
    data: Tokens,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Reading:
    """Run the model on all windows, one block in memory at a time. Its head stays loaded.

    What a recipe makes of a model is solved block by block meanwhile, once. Warns if other readers
    of this model round keys and values, which qlab does not.
    """
    quantized = model if isinstance(model, Quantized) else None
    checkpoint = _checkpoint(model)
    checkpoint.warn_unapplied()
    skeleton = Skeleton(checkpoint, dtype, device)
    refuse_missing(skeleton.names)
    refuse_uncounted(skeleton)
    check_length(skeleton, data.longest)
    load_outside(skeleton, with_head=True)
    for name, leaf in quantized.around() if quantized else ():
        put(skeleton.model, name, dense(leaf, dtype).to(skeleton.device))
    windows = in_batches(data)
    states, calls = record(skeleton, windows)
    axis = windows_axis(states[0][0], windows[0]["input_ids"].shape)
    trail = []
    blocks = _solved(quantized, skeleton, calls[0]) if quantized else _loaded(skeleton, calls[0])
    for graph in blocks:
        entering = ((call[graph.path], h) for call, h in zip(calls, states))
        states = list(push(graph, entering))
        trail.append(states[0][0].select(axis, 0).cpu())
        del graph, entering  # lets go of the block before the next one comes
    return Reading(
        skeleton=skeleton,
        hidden=torch.cat([hidden for (hidden,) in states], axis),
        trail=torch.stack(trail),
        windows=axis,
        stages=tuple(stage.name for stage in quantized.recipe) if quantized else (),
    )


def _loaded(skeleton: Skeleton, calls: Mapping[str, Call]) -> Iterator[ModuleGraph]:
    """Every block as the files hold it."""
    name = skeleton.checkpoint.path.name
    for path in progress(list(skeleton.blocks), f"reading {name}"):
        yield load_block(skeleton, path, calls[path])


def _solved(
    quantized: Quantized, skeleton: Skeleton, calls: Mapping[str, Call]
) -> Iterator[ModuleGraph]:
    """Every block as the recipe makes it, in the dtype of the skeleton."""
    for block in quantized.solved():
        yield as_read(skeleton, calls[block.after.path], block.before, block.after)
        del block


@undisturbed
@torch.no_grad()
def evaluate(
    model: Checkpoint | Quantized | Reading,
    against: Checkpoint | Quantized | Reading,
    data: Tokens,
    device: str = "cpu",
) -> Evaluation:
    """How far a model is from a reference, on windows of tokens: perplexity, KL, agreement.

    Both models run in fp32, one block in memory at a time.

    Args:
        model: a model, its path, what a recipe makes of it (`apply`), or what it was read as
            before.
        against: the reference, given in the same ways.
        data: windows [n, l] of tokens, as `first_windows` gives them, with l at least 2.
        device: where the blocks run, such as "cpu" or "cuda".

    Returns:
        An Evaluation: each figure with its 95 % interval over windows.

    Raises:
        QlabError: vocabularies, blocks or hidden sizes differ, windows are longer than the models'
            positions, a reading is of other tokens, or a model predicts NaN.

    Example:
        >>> import qlab
        >>> windows = qlab.first_windows("demo", "held-out.jsonl", length=16, count=2)
        >>> result = qlab.evaluate("demo-int4", "demo", windows)
        >>> result.predictions, result.kl > 0
        (30, True)
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
    _check_blocks(ours, theirs)
    per_window = [_window(ours, theirs, data.ids, i) for i in range(len(data.ids))]

    def over_windows(figure: str) -> Tensor:
        return torch.stack([figures[figure] for figures in per_window])

    nll, nll_ref = over_windows("nll"), over_windows("nll_ref")
    kl, top1, kl_of_tokens = over_windows("kl"), over_windows("top1"), over_windows("kl_of_tokens")
    lost, gained = (int(over_windows(figure).sum()) for figure in ("lost", "gained"))
    median, p90, p99, most = quantiles(kl_of_tokens.flatten(), (0.5, 0.9, 0.99, 1.0))
    distance = (ours.trail - theirs.trail).flatten(1).norm(dim=1)
    size = theirs.trail.flatten(1).norm(dim=1).clamp_min(1e-30)
    error = distance / size
    windows, length = data.ids.shape
    return Evaluation(
        perplexity=float(nll.mean().exp()),
        perplexity_ci=bootstrap(nll, torch.exp),
        reference_perplexity=float(nll_ref.mean().exp()),
        ratio_ci=bootstrap(nll - nll_ref, torch.exp),
        kl=float(kl.mean()),
        kl_ci=bootstrap(kl),
        top1_agreement=float(top1.mean()),
        top1_ci=bootstrap(top1),
        windows=windows,
        length=length,
        predictions=windows * (length - 1),
        layer_error=tuple(float(e) for e in error),
        kl_median=median,
        kl_p90=p90,
        kl_p99=p99,
        kl_max=most,
        flips_lost=lost,
        flips_gained=gained,
        flips_p=mcnemar(lost, gained),
        nll_by_window=tuple(nll.tolist()),
        nll_ref_by_window=tuple(nll_ref.tolist()),
        kl_by_window=tuple(kl.tolist()),
        ids_sha256=hashlib.sha256(data.ids.cpu().numpy().tobytes()).hexdigest(),
        calibration_overlap=calibration_overlap(
            model if isinstance(model, Quantized) else _checkpoint(model), data.ids
        ),
    )


@undisturbed
@torch.no_grad()
def perplexity(
    model: Checkpoint | Quantized | Reading, data: Tokens, device: str = "cpu"
) -> Perplexity:
    """How well a model predicts windows of tokens: exp(mean NLL).

    The model runs in fp32, one block in memory at a time.

    Args:
        model: a model, its path, what a recipe makes of it (`apply`), or what it was read as
            before.
        data: windows [n, l] of tokens, as `first_windows` gives them, with l at least 2.
        device: where the blocks run, such as "cpu" or "cuda".

    Returns:
        A Perplexity: the figure with its 95 % interval over windows.

    Raises:
        QlabError: windows are longer than the model's positions, a reading is of other tokens, or
            the model predicts NaN.

    Example:
        >>> import qlab
        >>> windows = qlab.first_windows("demo", "held-out.jsonl", length=16, count=2)
        >>> result = qlab.perplexity("demo-int4", windows)
        >>> result.windows, result.predictions, result.perplexity > 1
        (2, 30, True)
    """
    reading = model if isinstance(model, Reading) else read(model, data, device=device)
    if isinstance(model, Quantized):
        calibration_overlap(model, data.ids)  # which a reading does not know
    evaluation = evaluate(reading, reading, data)
    return Perplexity(
        perplexity=evaluation.perplexity,
        perplexity_ci=evaluation.perplexity_ci,
        windows=evaluation.windows,
        length=evaluation.length,
        predictions=evaluation.predictions,
    )


def _checkpoint(model: Checkpoint | Quantized | Reading) -> Checkpoint:
    if isinstance(model, Quantized):
        return model.model
    return model.skeleton.checkpoint if isinstance(model, Reading) else model


def _check_vocabularies(
    model: Checkpoint | Quantized | Reading, against: Checkpoint | Quantized | Reading
) -> None:
    size, reference_size = (
        _checkpoint(each).config.get_text_config().vocab_size for each in (model, against)
    )
    if size != reference_size:
        raise QlabError(
            f"{_checkpoint(model).path} has a vocabulary of {size} tokens and the reference "
            f"{_checkpoint(against).path} one of {reference_size}; compare a model with the one "
            "that it was made from"
        )


def _check_blocks(ours: Reading, theirs: Reading) -> None:
    if ours.trail.shape != theirs.trail.shape:
        blocks, *_, width = ours.trail.shape
        reference_blocks, *_, reference_width = theirs.trail.shape
        raise QlabError(
            f"{_checkpoint(ours).path} has {blocks} blocks of hidden size {width} and the "
            f"reference {_checkpoint(theirs).path} has {reference_blocks} of {reference_width}; "
            "compare a model with the one that it was made from"
        )


def _window(ours: Reading, theirs: Reading, ids: Tensor, i: int) -> Mapping[str, Tensor]:
    """Means over the predicted tokens of window i; the divergence of each; and how many answers
    are right for the reference alone (lost) and for the model alone (gained)."""
    tokens, next_tokens = ids[i : i + 1], ids[i, 1:]
    log_p = _log_probabilities(theirs, tokens, i)
    log_q = log_p if ours is theirs else _log_probabilities(ours, tokens, i)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    answers, answers_ref = log_q.argmax(-1), log_p.argmax(-1)
    agreement = answers == answers_ref
    right, right_ref = answers == next_tokens, answers_ref == next_tokens
    return {
        "nll": F.nll_loss(log_q, next_tokens).double(),
        "nll_ref": F.nll_loss(log_p, next_tokens).double(),
        "kl": kl.double().mean(),
        "top1": agreement.double().mean(),
        "kl_of_tokens": kl,
        "lost": (right_ref & ~right).sum(),
        "gained": (right & ~right_ref).sum(),
    }


def _log_probabilities(reading: Reading, tokens: Tensor, i: int) -> Tensor:
    """Log probabilities of the tokens 1 to l - 1 of window i: [l - 1, vocabulary]."""
    logits = head(reading.skeleton, tokens, reading.hidden.narrow(reading.windows, i, 1))[0, :-1]
    if not torch.isfinite(logits).all():
        behind = f" behind {', '.join(reading.stages)}; look at what these steps make of it"
        why = behind if reading.stages else "; its weights are damaged"
        path = reading.skeleton.checkpoint.path
        raise QlabError(f"{path} predicts NaN or Inf in window {i}{why}")
    return logits.float().log_softmax(-1).cpu()
