"""A whole model as a bind measures it: streamed forward and backward, one segment in memory at a
time.

Legend: l tokens of a window, v the vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.algebra.divergence import kl_divergence
from qlab.algebra.frame import in_frame
from qlab.algebra.graph import ModuleGraph
from qlab.algebra.once import dense_once
from qlab.algebra.running import select
from qlab.algebra.transform import Stage
from qlab.data.calibration import Data, from_ids
from qlab.driver.backward import Cotangent, Loss, Sink, back, end, value_of
from qlab.driver.batches import in_batches, push, record
from qlab.driver.job import Begun, Job
from qlab.driver.ranks import Ranks
from qlab.driver.windows import Pass, summed, tried, variables_of
from qlab.driver.writing import as_read
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.model.calls import Call, State
from qlab.model.loading import load_block, load_outside, placed
from qlab.model.running import head
from qlab.model.skeleton import Skeleton
from qlab.process.surroundings import undisturbed

Changed = Callable[[str, ModuleGraph], ModuleGraph]  # a segment's path, and the segment
T = TypeVar("T")


def loaded_around(skeleton: Skeleton) -> dict[str, Tensor]:
    """Name -> the parameter around the blocks (embedding, norm, head), loaded."""
    load_outside(skeleton, with_head=True)
    named = skeleton.model.named_parameters(remove_duplicate=False)
    return {name: parameter.detach() for name, parameter in named if not parameter.is_meta}


def _unchanged(path: str, graph: ModuleGraph) -> ModuleGraph:
    return graph


class Model:
    """A model as the steps in front of a bind make it, which `qlab.bind` hands to its measurement.

    It runs in fp32. What lies around the blocks is in memory, and one segment (a block) at a time.
    Where the bind is `divided`, several ranks each run their own windows.

    Args:
        job: the steps in front, with the model and the calibration data.
        skeleton: the model around its blocks, in fp32.
        kept: the segments that those steps made; None for the unquantized model.
        loaded: name -> the parameter around the segments (embedding, norm, head), as the files hold
            it.
        rounded: name -> one that those steps made another.
        bind: the step that measures it, whose sites are the selected ones of each segment.
        ranks: those that measure it together.

    Example:
        >>> import qlab
        >>> def measure(model):
        ...     return model.losses(model.nll)
        >>> recipe = qlab.bind("nll", measure, lambda losses: qlab.rtn("int4-g64"))
        >>> data = qlab.tokens("demo", "my.jsonl", samples=2, length=16)
        >>> qlab.apply("demo", recipe, data).bits_per_weight
        4.25
    """

    def __init__(
        self,
        job: Job,
        skeleton: Skeleton,
        kept: Begun | None,
        *,
        loaded: Mapping[str, Tensor],
        rounded: Mapping[str, Tensor],
        bind: Stage,
        ranks: Ranks,
    ):
        self._job, self._skeleton, self._kept = job, skeleton, kept
        self._loaded, self._rounded, self._bind = loaded, rounded, bind
        self._ranks = ranks

    @property
    def checkpoint(self) -> Checkpoint:
        """The files of the unquantized model."""
        return self._job.model

    @property
    def data(self) -> Data:
        """The calibration samples."""
        if self._job.data is None:
            raise QlabError(
                "a bind of the recipe measures on calibration text and none was given; give data"
            )
        return self._job.data

    @property
    def count(self) -> int:
        """The number of windows (or of samples, where they hold images)."""
        return len(self._windows)

    def ids(self, window: int) -> Tensor:
        """The token ids [l] of a window."""
        return self._windows[window]["input_ids"][0]

    @property
    def segments(self) -> tuple[str, ...]:
        """The paths of the segments, in running order."""
        return tuple(self._skeleton.blocks)

    @cached_property
    def reference(self) -> "Model":
        """The unquantized model on the same windows."""
        if self._kept is None and not self._rounded:
            return self
        return Model(
            self._job,
            self._skeleton,
            None,
            loaded=self._loaded,
            rounded={},
            bind=self._bind,
            ranks=self._ranks,
        )

    def running(self, dtype: torch.dtype) -> "Model":
        """The same model whose blocks and head compute in another dtype; losses stay in fp32."""
        if dtype == self._skeleton.dtype:
            return self
        skeleton = Skeleton(self.checkpoint, dtype, self._job.device)
        loaded = loaded_around(skeleton)
        rounded = {name: t.to(loaded[name].dtype) for name, t in self._rounded.items()}
        return Model(
            self._job,
            skeleton,
            self._kept,
            loaded=loaded,
            rounded=rounded,
            bind=self._bind,
            ranks=self._ranks,
        )

    @property
    def around(self) -> Mapping[str, Tensor]:
        """Name -> the parameter, for what lies around the segments (embedding, norm, head)."""
        return {**self._loaded, **self._rounded}

    @undisturbed
    @torch.no_grad()
    def segment(self, path: str) -> ModuleGraph:
        """One segment, loaded: a value of its own each time. `segment.sites` are those that the
        bind is for."""
        if path not in self._skeleton.blocks:
            raise QlabError(f"{path!r} is no segment; they are {', '.join(self.segments)}")
        call = self._calls[path]
        if self._kept is None:
            return select(self._bind, load_block(self._skeleton, path, call, decoded=True))
        graph = in_frame(self._kept.block(path, self._skeleton.device))
        before = replace(graph, params=self._kept.unchanged(graph))
        return select(self._bind, as_read(self._skeleton, call, before, graph))

    def fold(self, fn: Callable[[T, str, ModuleGraph], T], start: T) -> T:
        """fn(... fn(fn(start, path, segment), path, segment) ...) over the segments in running
        order, with one in memory at a time."""
        for path in self.segments:
            start = fn(start, path, self.segment(path))
        return start

    @undisturbed
    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """The logits [n, l, v] of windows of token ids [n, l], in fp32 on the CPU."""
        windows = [{"input_ids": ids} for ids in from_ids(self.checkpoint, ids).ids.split(1)]
        whole = Pass(range(len(windows)), len(windows), self._ranks)
        finals = self._run(whole, windows, _unchanged, {})
        with self._placed({}):
            own = {i: self._head(windows[i], h).float().cpu() for i, h in finals.items()}
        return torch.cat(whole.all_told(own))

    def nll(self, logits: Tensor, window: int) -> Tensor:
        """The mean negative log likelihood of a window's tokens: a loss for `vjp`."""
        return F.cross_entropy(logits[:-1], self.ids(window)[1:].to(logits.device))

    def kl_to(self, reference: "Model") -> Loss:
        """A loss for `vjp`: the mean over a window's predictions of KL(reference || model).

        The reference runs once, here; its final hidden states stay in memory, on each rank those of
        the windows whose losses it computes.
        """
        finals = reference._run(self._pass(None), self._windows, _unchanged, {})

        def loss(logits: Tensor, window: int) -> Tensor:
            with torch.no_grad(), reference._placed({}):
                target = reference._head(self._windows[window], finals[window])[0, :-1]
            return kl_divergence(logits, target)

        return loss

    @undisturbed
    @torch.no_grad()
    def losses(
        self,
        loss: Loss,
        windows: Iterable[int] | None = None,
        *,
        changed: Changed = _unchanged,
        around: Mapping[str, Tensor] | None = None,
    ) -> list[float]:
        """The loss of each window, without gradients; the arguments are those of `vjp`."""
        chosen = self._pass(windows)
        finals = chosen.brought_home(self._run(chosen, self._windows, changed, around or {}))

        def value(place: int) -> float:
            i = chosen.numbers[place]
            return float(value_of(loss, self._head(self._windows[i], finals[place])[0].float(), i))

        with self._placed(around or {}):
            return chosen.agreed(tried(chosen.at_home, value))

    @undisturbed
    @torch.no_grad()
    def vjp(
        self,
        loss: Loss,
        windows: Iterable[int] | None = None,
        *,
        changed: Changed = _unchanged,
        sink: Sink | None = None,
        around: Mapping[str, Tensor] | None = None,
        after: Callable[[str], None] | None = None,
    ) -> list[float]:
        """The loss of each window, and the gradients of their sum.

        The windows go forward through one segment after the other, of which only what passes
        between segments is kept; then back, each segment loaded and run again when its turn comes.
        Gradients are added up within parts of the windows, and then part by part, so that they are
        the same bits for any number of ranks.

        Args:
            loss: (logits [l, v], window) -> a number, such as `model.nll` or
                `model.kl_to(model.reference)`.
            windows: numbers of windows; None takes all.
            changed: (path, segment) -> the segment that is run in its place, which may hold tensors
                that require gradients, also in its operations at run time. It is called once
                forward and once backward for each segment, and the gradients add up in those
                tensors' `.grad`.
            sink: takes the `Gradients` of each dense leaf, segment by segment from the last to the
                first and window by window; they are let go of afterwards. Of several ranks each
                sees those of the windows that it runs (`of_all_windows`).
            around: name -> a tensor in the place of a parameter around the segments (`around`); one
                that requires gradients gets them in `.grad`.
            after: takes the path of each segment when its gradients are complete.

        Returns:
            The loss of each window.

        Raises:
            QlabError: a loss that is NaN, no number, or depends on nothing that the model computes.
        """
        chosen, around = self._pass(windows), around or {}
        variables = variables_of(around.values())
        with self._placed(around):
            own = [self._windows[chosen.numbers[place]] for place in chosen.own]
            with torch.set_grad_enabled(bool(variables)):
                entering, calls = record(self._skeleton, own)
            states = [tuple(t.detach() for t in state) for state in entering]
            boundaries = []
            for path in self.segments:
                boundaries.append(states)
                graph = dense_once(changed(path, self.segment(path)))
                states = list(push(graph, zip([c[path] for c in calls], states)))
                del graph
            values, gradients = self._of_heads(loss, chosen, states, variables)
            for path in reversed(self.segments):
                states = boundaries.pop()
                batches = {p: (c[path], s) for p, c, s in zip(chosen.own, calls, states)}
                with torch.enable_grad():
                    graph = changed(path, self.segment(path))
                gradients = back(graph, chosen, batches, gradients, sink)
                del graph, states, batches
                if after is not None:
                    after(path)
            end(dict(zip(chosen.own, entering)), chosen, gradients, variables)
        return values

    def of_all_windows(self, noted: Sequence[T]) -> list[T]:
        """What was noted of each window in a pass over all of them, in their order.

        Args:
            noted: what this rank noted of the windows that it ran; one process runs all.
        """
        whole = self._pass(None)
        return whole.all_told(dict(zip(whole.own, noted, strict=True)))

    # --------------------------------------------------------------- how it runs
    @cached_property
    def _windows(self) -> Sequence[Mapping[str, Tensor]]:
        return in_batches(self.data, 1)

    @cached_property
    def _calls(self) -> Mapping[str, Call]:
        """What each segment is called with, for one window."""
        window = self._windows[0] if self._job.data is not None else in_batches(None)[0]
        return record(self._skeleton, [window])[1][0]

    def _pass(self, windows: Iterable[int] | None) -> Pass:
        """A pass over these windows, or over all."""
        numbers = list(range(self.count)) if windows is None else [int(i) for i in windows]
        unknown = [i for i in numbers if not 0 <= i < self.count]
        if unknown or not numbers:
            what = f"window {unknown[0]} is not there" if unknown else "no window was named"
            raise QlabError(f"{what}; the calibration data has windows 0 to {self.count - 1}")
        return Pass(numbers, self.count, self._ranks)

    def _placed(self, around: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Tensors in the places of parameters around the segments, for now."""
        unknown = around.keys() - self.around.keys()
        if unknown:
            raise QlabError(
                f"{min(unknown)!r} is no parameter around the segments; they are "
                f"{', '.join(self.around)}"
            )
        return placed(self._skeleton.model, {**self.around, **around})

    @undisturbed
    @torch.no_grad()
    def _run(
        self,
        chosen: Pass,
        windows: Sequence[Mapping[str, Tensor]],
        changed: Changed,
        around: Mapping[str, Tensor],
    ) -> dict[int, Tensor]:
        """Place in the pass -> the final hidden states, of what this rank runs. windows: by their
        numbers."""
        own = [windows[chosen.numbers[place]] for place in chosen.own]
        with self._placed(around):
            states, calls = record(self._skeleton, own)
        for path in self.segments:
            graph = dense_once(changed(path, self.segment(path)))
            states = list(push(graph, zip([c[path] for c in calls], states)))
            del graph
        return {place: state[0] for place, state in zip(chosen.own, states)}

    def _head(self, window: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return head(self._skeleton, window["input_ids"], hidden)

    def _of_heads(
        self, loss: Loss, chosen: Pass, states: Sequence[State], variables: Sequence[Tensor]
    ) -> tuple[list[float], dict[int, Cotangent]]:
        """The loss of each window, and its gradient at what leaves the last segment, of the windows
        that this rank runs. variables: what gathers gradients around the segments."""
        arrived = chosen.brought_home({p: hidden for p, (hidden,) in zip(chosen.own, states)})
        values: dict[int, Any] = {}
        gradients: dict[int, Cotangent] = {}

        def value(place: int) -> float:
            i = chosen.numbers[place]
            with torch.enable_grad():
                hidden = arrived[place].detach().requires_grad_()
                loss_of_it = value_of(loss, self._head(self._windows[i], hidden)[0].float(), i)
            if not loss_of_it.requires_grad:
                raise QlabError(
                    "the loss does not depend on the logits that it was given; compute it of them, "
                    "without detach() or item()"
                )
            loss_of_it.backward()
            gradient = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
            gradients[place] = (gradient,)
            return float(loss_of_it.detach())

        summed(variables, chosen.homes, self._ranks, lambda part: values.update(tried(part, value)))
        found = chosen.agreed(values)
        return found, chosen.brought_back(gradients)
