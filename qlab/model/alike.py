"""Two directories of one model, whose files spell its tensors in ways of their own: two generations
of transformers, prefixes of other tools, experts fused or one by one, a head that is written down
or left to be the embedding.

transformers' own rules say which parameter a stored tensor is loaded into; nothing here knows a
name.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.files.shardwise import leaves_by_file
from qlab.model.linears import HEAD, experts_apart
from qlab.model.paper import on_paper
from qlab.model.spelling import identities
from qlab.model.ties import FLAG, apart, ties


@dataclass(frozen=True)
class Alike:
    """model, reference: the two directories, by the names of the first. names: a leaf of the
    reference's files -> its name here.

    doubled: leaves that are another one too in both directories, so that either may leave them out.
    mistied: whether config.json of the directory ties what its files hold apart, or nothing to what
    they lack and the reference's have.
    """

    model: Checkpoint
    reference: Checkpoint
    names: Mapping[str, str]
    doubled: frozenset[str] = frozenset()
    mistied: bool = False


def alike(model: Checkpoint, reference: Checkpoint) -> Alike:
    """Both directories by one set of names, as far as transformers knows their architecture and
    takes both for the same."""
    papers = _on_paper(model), _on_paper(reference)
    ours, theirs = papers
    if ours is None or theirs is None or type(ours) is not type(theirs):
        mistied = bool(model.raw.get(FLAG)) or f"{HEAD}.weight" not in _leaves(model)
        return Alike(model, experts_apart(reference, whole=model.stored), {}, mistied=mistied)
    reference, names = _renamed(reference, theirs, model, ours)
    reference = experts_apart(reference, whole=model.stored)
    model = experts_apart(model, whole=reference.stored)
    reference, again = _renamed(reference, theirs, model, ours)
    names = {name: again.get(here, here) for name, here in names.items()} | again
    tied = [_tied(m, paper) for m, paper in ((model, ours), (reference, theirs))]
    spelled = {
        identity: name
        for name, identity in identities(ours, _leaves(model) | _leaves(reference)).items()
    }
    both = {frozenset(pair) for pair in tied[0].items()} & {
        frozenset(pair) for pair in tied[1].items()
    }
    doubled = frozenset(spelled[name] for pair in both for name in pair if name in spelled)
    held = set(identities(ours, _leaves(model)).values()) | tied[0].keys()
    lacking = {name for pair in tied[1].items() for name in pair} - held
    return Alike(
        model=model,
        reference=reference,
        names=names,
        doubled=doubled,
        mistied=bool(lacking or apart(ours, tied[0])),
    )


def _on_paper(model: Checkpoint) -> PreTrainedModel | None:
    try:
        return on_paper(model, model.dtype) if model.known else None
    except QlabError:
        return None


def _leaves(model: Checkpoint) -> set[str]:
    """The names of everything that is loaded into one parameter: of a quantized module, that of its
    weight."""
    return {name for file in leaves_by_file(model) for name in file}


def _tied(model: Checkpoint, paper: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the one that it is too, in these files; those that they lack are the others'."""
    spelled = {identity: name for name, identity in identities(paper, _leaves(model)).items()}
    return ties(paper, spelled.__contains__, lambda a, b: model.equal(spelled[a], spelled[b]))


def _renamed(
    reference: Checkpoint, theirs: PreTrainedModel, model: Checkpoint, ours: PreTrainedModel
) -> tuple[Checkpoint, dict[str, str]]:
    """The reference with the model's names for the leaves that both hold, and what is called
    otherwise now."""
    here = _by_identity(model, ours)
    names = {
        name: here[identity]
        for identity, name in _by_identity(reference, theirs).items()
        if identity in here
    }
    moved = {name: new for name, new in names.items() if name != new}
    modules = {
        module: moved[f"{module}.weight"].rpartition(".")[0]
        for module in reference.quantized
        if f"{module}.weight" in moved
    }

    def spelled(name: str) -> str:
        module, _, kind = name.rpartition(".")
        return f"{modules[module]}.{kind}" if module in modules else moved.get(name, name)

    return replace(
        reference,
        stored={spelled(name): tensor for name, tensor in reference.stored.items()},
        quantized={
            modules.get(module, module): spec for module, spec in reference.quantized.items()
        },
        inputs={modules.get(module, module): spec for module, spec in reference.inputs.items()},
    ), moved


def _by_identity(model: Checkpoint, paper: PreTrainedModel) -> dict[Hashable, str]:
    """What a leaf is -> its name; one that is alone for several is the one that the model's class
    names as theirs."""
    found: dict[Hashable, str] = {}
    for name, identity in identities(paper, _leaves(model)).items():
        found.setdefault(identity, name)
    for name, keeper in ties(paper, found.__contains__, lambda a, b: False).items():
        if (
            keeper not in paper.all_tied_weights_keys.values()
            and paper.all_tied_weights_keys.get(keeper) == name
        ):
            found[name] = found.pop(keeper)
    return found
