"""What a step sees of a model. When it runs, and what is checked of it, follows from that alone.

| view | it runs | what is checked |
|---|---|---|
| `EachWeight` | when its input's turn comes | it reads and changes no other weight |
| `OnWires` | when the wire's turn comes | it changes no weight, and no other wire |
| `Shifted` | when the wire's turn comes | the function stays; attention sees no shift |
| `PlainCache` | when the wire's turn comes | no weight changes; each block caches these |
| `Gauged` | before any weight that reads the wire is rounded | the function stays |
| `Folded` | when all inputs of the segment are done | the function stays |
| `WholeBlock` | when the steps before it are done with the block | |
| `WholeSegment` | likewise, without samples | |
| `WholeModel` | when the steps before it are done with all blocks | |
| `WholeModelBasis` | before all other steps | every segment can take another basis |
| `EverySegment` | before all other steps, on what lies around the blocks too | the function stays |
| `Uncovered` | before all others | there is nothing to see |
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from qlab.algebra.graph import Op
from qlab.algebra.spec import Spec
from qlab.algebra.windows import Schedule


class View:
    """What a step sees. The properties are what the driver and the checks ask of it. sees: in
    words, for plans."""

    sees: ClassVar[str] = "the segment"

    @property
    def site_by_site(self) -> bool:
        """Whether what the step does at an input depends on the weights and statistics there alone.
        It runs when that input's turn comes, on what the quantized weights before it produce, and
        other weights are hidden from it."""
        return False

    @property
    def keeps_function(self) -> bool:
        """Whether what the segment computes stays. It is checked on a batch."""
        return False

    @property
    def wires(self) -> str | None:
        """The pattern of the wires that the step works on, and whose statistics it reads; None of a
        step that works on weights and their inputs."""
        return None

    @property
    def operations(self) -> tuple[Op, ...]:
        """What the step leaves at run time, as a codec is asked about it."""
        return ()


@dataclass(frozen=True)
class EachWeight(View):
    """One weight at a time, and the statistics of its input. leaves: in words, what the step puts
    into the place of weights that is neither numbers nor codes, as formats are asked about it; ""
    where it puts nothing else. beside: (shape, spec) -> the bits of what it puts beside the codes
    of a weight, for plans; None where that is not known beforehand. check: refuses a number of
    input channels that the step has no place for, before it runs; None where it takes any."""

    leaves: str = ""
    beside: Callable[[torch.Size, Spec | None], float] | None = None
    check: Callable[[int], None] | None = None
    by_expert: bool = False

    sees: ClassVar[str] = "each weight"

    @property
    def site_by_site(self) -> bool:
        return True


@dataclass(frozen=True)
class OnWires(View):
    """The wires that a pattern matches, one at a time, and their statistics. The step puts
    operations on them."""

    sees: ClassVar[str] = "each wire"

    pattern: str
    left: tuple[Op, ...] = ()

    @property
    def site_by_site(self) -> bool:
        return True

    @property
    def wires(self) -> str:
        return self.pattern

    @property
    def operations(self) -> tuple[Op, ...]:
        return self.left


@dataclass(frozen=True)
class Shifted(OnWires):
    """Keys of attentions, from which a step takes the same vector for every token. The function
    stays, since a softmax sees differences of scores alone."""

    sees: ClassVar[str] = "the keys of each attention"

    @property
    def keeps_function(self) -> bool:
        return True


@dataclass(frozen=True)
class PlainCache(OnWires):
    """The keys and values of all attentions, as a cache holds them. Blocks whose cache holds
    something else are refused by name. stores_scales: whether scales are measured beforehand."""

    stores_scales: bool = False


@dataclass(frozen=True)
class Gauged(View):
    """A wire with its readers, which turn together, and with what produces it.

    pattern: of the wires; None where they are the inputs of the sites in the step's scope. left:
    the operations that stay at run time. by_source: whether inputs are turned one after the other,
    each when those before it are rounded, and not all of a segment before any is. made_of: a
    pattern over the names of what inputs are made of (`groups.made_of`), of which the step's scope
    keeps those alone; None where it keeps all.
    """

    sees: ClassVar[str] = "each input, its readers and its producer"

    pattern: str | None = None
    left: tuple[Op, ...] = ()
    by_source: bool = False
    made_of: str | None = None

    @property
    def site_by_site(self) -> bool:
        return self.by_source

    @property
    def keeps_function(self) -> bool:
        return True

    @property
    def wires(self) -> str | None:
        return self.pattern

    @property
    def operations(self) -> tuple[Op, ...]:
        return self.left


@dataclass(frozen=True)
class Folded(View):
    """The segment, once all its inputs are done. What it computes stays."""

    @property
    def keeps_function(self) -> bool:
        return True


@dataclass(frozen=True)
class EverySegment(View):
    """Each segment of the model, embedding and head among them, for a basis that all share."""

    sees: ClassVar[str] = "each segment, embedding and head too"

    @property
    def keeps_function(self) -> bool:
        return True


@dataclass(frozen=True)
class WholeBlock(View):
    """A block with its samples: what enters it, and what leaves it in the unquantized model.

    windows: how many of them the step runs forward and backward, for the estimate of time. leaves:
    as of `EachWeight`. by_weight: how long, where it makes each weight of gradients there alone,
    which `qlab.algebra.learn` adds up, so that ranks may have some weights each.
    """

    sees: ClassVar[str] = "the block and its samples"

    windows: int = 0
    leaves: str = ""
    by_weight: Schedule | None = None


@dataclass(frozen=True)
class WholeSegment(View):
    """The segment, with the statistics of its inputs."""


@dataclass(frozen=True)
class WholeModel(View):
    """All segments behind the steps before it, which are done with each of them then."""

    sees: ClassVar[str] = "the whole model"


@dataclass(frozen=True)
class WholeModelBasis(WholeModel):
    """The whole model before every other step, for a basis that all segments share: what chooses it
    comes behind."""


@dataclass(frozen=True)
class Uncovered(View):
    """The names that no rule before it covers. There may be none."""

    sees: ClassVar[str] = "names"

    @property
    def site_by_site(self) -> bool:
        return True
