"""Two directories of one model, under one set of names.

Their files may spell its tensors in different ways: as two generations of transformers did, with
prefixes of other tools, with experts fused or one by one, with a head that is written down or left
out as the embedding's. transformers' own rules say which parameter a stored tensor is loaded into;
nothing here knows a name.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from qlab.files.checkpoint import Checkpoint
from qlab.files.shardwise import leaves_by_file
from qlab.model.linears import HEAD
from qlab.model.modules import Modules
from qlab.model.spelling import identities
from qlab.model.ties import FLAG, apart, ties


@dataclass(frozen=True, kw_only=True)
class Alike:
    """Two directories under the first one's names.

    model, reference: the directories. names: a leaf of the reference's files -> its name here.
    doubled: leaves that are one with another leaf in both directories, so that either directory may
    leave them out. mistied: whether config.json of the model ties what its files hold apart, or
    ties nothing to a tensor that its files lack and the reference's have.
    """

    model: Modules
    reference: Modules
    names: Mapping[str, str]
    doubled: frozenset[str] = frozenset()
    mistied: bool = False


def alike(model: Modules, reference: Modules) -> Alike:
    """Both directories under one set of names, as far as transformers knows their architecture and
    takes both for the same."""
    ours, theirs = model.model, reference.model
    if ours is None or theirs is None or type(ours) is not type(theirs):
        checkpoint = model.checkpoint
        return Alike(
            model=model,
            reference=reference.experts_apart(whole=checkpoint.stored),
            names={},
            mistied=bool(checkpoint.raw.get(FLAG)) or f"{HEAD}.weight" not in _leaves(checkpoint),
        )
    reference, names = _renamed(reference, model)
    reference = reference.experts_apart(whole=model.checkpoint.stored)
    model = model.experts_apart(whole=reference.checkpoint.stored)
    reference, names_again = _renamed(reference, model)
    names = {name: names_again.get(here, here) for name, here in names.items()} | names_again
    ties_of_model, ties_of_reference = _tied(model, ours), _tied(reference, theirs)
    return Alike(
        model=model,
        reference=reference,
        names=names,
        doubled=_doubled(model, reference, ties_of_model, ties_of_reference),
        mistied=bool(
            apart(ours, ties_of_model) or _lacking(model, ours, ties_of_model, ties_of_reference)
        ),
    )


def _leaves(checkpoint: Checkpoint) -> set[str]:
    """The names of everything that is loaded into one parameter: of a quantized module, that of its
    weight."""
    return {name for file in leaves_by_file(checkpoint) for name in file}


def _tied(modules: Modules, model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the parameter that it is one with in these files. Of two, the one that the files
    lack is the key."""
    checkpoint = modules.checkpoint
    spelled = {identity: name for name, identity in identities(model, _leaves(checkpoint)).items()}
    return ties(model, spelled.__contains__, lambda a, b: checkpoint.equal(spelled[a], spelled[b]))


def _doubled(
    model: Modules,
    reference: Modules,
    ties_of_model: Mapping[str, str],
    ties_of_reference: Mapping[str, str],
) -> frozenset[str]:
    """The names of the leaves whose parameters both directories tie to each other."""
    assert model.model is not None
    leaves = _leaves(model.checkpoint) | _leaves(reference.checkpoint)
    spelled = {identity: name for name, identity in identities(model.model, leaves).items()}
    pairs = {frozenset(pair) for pair in ties_of_model.items()}
    pairs &= {frozenset(pair) for pair in ties_of_reference.items()}
    return frozenset(spelled[name] for pair in pairs for name in pair if name in spelled)


def _lacking(
    modules: Modules,
    model: PreTrainedModel,
    ties_of_model: Mapping[str, str],
    ties_of_reference: Mapping[str, str],
) -> set[str]:
    """The parameters that the reference ties, and of which the model's files hold neither a leaf
    nor one that is tied to it."""
    parameters = set(identities(model, _leaves(modules.checkpoint)).values())
    tied = {name for pair in ties_of_reference.items() for name in pair}
    return tied - parameters - ties_of_model.keys()


def _renamed(reference: Modules, model: Modules) -> tuple[Modules, dict[str, str]]:
    """The reference with the model's names for the leaves that both hold, and what is called
    otherwise now."""
    names_here = _by_identity(model)
    names = {
        name: names_here[identity]
        for identity, name in _by_identity(reference).items()
        if identity in names_here
    }
    moved = {name: new for name, new in names.items() if name != new}
    checkpoint = reference.checkpoint
    modules = {
        module: moved[f"{module}.weight"].rpartition(".")[0]
        for module in checkpoint.quantized
        if f"{module}.weight" in moved
    }

    def spelled(name: str) -> str:
        module, _, kind = name.rpartition(".")
        return f"{modules[module]}.{kind}" if module in modules else moved.get(name, name)

    renamed = replace(
        checkpoint,
        stored={spelled(name): tensor for name, tensor in checkpoint.stored.items()},
        quantized={
            modules.get(module, module): spec for module, spec in checkpoint.quantized.items()
        },
        inputs={modules.get(module, module): spec for module, spec in checkpoint.inputs.items()},
    )
    return reference.described_as(renamed), moved


def _by_identity(modules: Modules) -> dict[Hashable, str]:
    """What a leaf is -> its name. A leaf that is alone for several parameters is the one that the
    model's class names as theirs."""
    model = modules.model
    assert model is not None
    names: dict[Hashable, str] = {}
    for name, identity in identities(model, _leaves(modules.checkpoint)).items():
        names.setdefault(identity, name)
    declared = model.all_tied_weights_keys
    for name, keeper in ties(model, names.__contains__, lambda a, b: False).items():
        if keeper not in declared.values() and declared.get(keeper) == name:
            names[name] = names.pop(keeper)
    return names
