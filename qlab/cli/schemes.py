"""Schemes on the command line: the command that lists them, and what --scheme, --kv-cache and
--static stand for."""

from dataclasses import replace
from typing import TYPE_CHECKING

from qlab.cli.options import Json
from qlab.cli.output import console, report
from qlab.errors import QlabError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from qlab.algebra.spec import Spec
    from qlab.algebra.transform import Transform
    from qlab.methods.schemes import Scheme

    Maker = Callable[[Spec], Transform]


def schemes(*, json_file: Json = None) -> None:
    """The schemes that --scheme takes: what each rounds, bits per weight, what runs it, which
    engines load it."""
    import qlab

    table = qlab.schemes()
    console().print(table)
    report(table.json(), json_file)


def chosen_scheme(
    name: str, kv_cache: str, static: str, spec: str, typed: "Collection[str]"
) -> "Scheme | None":
    """The scheme of --scheme or --spec with the cache of --kv-cache; None where neither a scheme
    nor a cache is named. spec: the spec's name. typed: the options that the command line has."""
    if not name and not kv_cache:
        if "static" in typed:
            raise QlabError(
                "--static says how a scheme's stored scales are measured, and no scheme is named; "
                "give --scheme or --kv-cache, or leave it out"
            )
        return None
    scheme = _named(name, typed) if name else _of_spec(spec, "asymmetric" in typed)
    if kv_cache:
        scheme = _with_cache(scheme, kv_cache)
    if "static" in typed and not scheme.static:
        raise QlabError(
            f"--static {static} would not be used, since all scales of {scheme} are found at run "
            "time; leave it out"
        )
    return scheme


def _named(name: str, typed: "Collection[str]") -> "Scheme":
    """The scheme of --scheme; refuses what names numbers beside it."""
    from qlab.methods.schemes import scheme

    numbers = [option for option in ("spec", "asymmetric", "bits") if option in typed]
    if numbers:
        raise QlabError(
            f"--scheme {name} and --{numbers[0]} both say what weights are rounded to; give one "
            "of them"
        )
    return scheme(name)


def _of_spec(spec: str, asymmetric: bool) -> "Scheme":
    """A scheme of weights alone."""
    from qlab.algebra.spec import parse_spec
    from qlab.methods.schemes import Scheme

    weights = parse_spec(spec, symmetric=not asymmetric)
    return Scheme(name=str(weights), weights=weights)


def _with_cache(scheme: "Scheme", name: str) -> "Scheme":
    """The scheme with a cache: that of another scheme, or a cache spec such as int8-head."""
    from qlab.algebra.wires import nearest
    from qlab.methods.kv import parse_cache_spec
    from qlab.methods.schemes import SCHEMES

    if scheme.cache:
        raise QlabError(
            f"--scheme {scheme} rounds the cache already, and --kv-cache {name} would again; give "
            "one of them"
        )
    known = SCHEMES.get(name.upper()) or SCHEMES.get(f"KV_{name.upper().replace('-', '_')}")
    caches = [each for each, other in SCHEMES.items() if other.cache]
    if known and known.cache is None:
        raise QlabError(
            f"--kv-cache {name} is a scheme of weights; name one of the cache: {', '.join(caches)}"
        )
    try:
        cache = known.cache if known else parse_cache_spec(name)
    except QlabError as error:
        if "-" in name:  # a cache spec
            raise
        raise QlabError(
            f"--kv-cache {name[:40]} is unknown; {nearest(name.upper(), caches)}, and a cache spec "
            "such as int8-head will do, too"
        ) from error
    return replace(scheme, name=f"{scheme}+{name}", cache=cache)


def refuse_unfilled(scheme: "Scheme", method: str, recipe: str | None) -> None:
    """Refuse a method for a scheme that has no weights to fill. method, recipe: as they were typed,
    or nothing."""
    if scheme.weights is None and (method or recipe):
        option = f"--method {method}" if method else f"--recipe {recipe}"
        raise QlabError(
            f"{option} would round nothing, since {scheme} is a scheme of the cache alone; leave "
            "it out, or name a scheme of weights and give --kv-cache"
        )
