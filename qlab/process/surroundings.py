"""What is set around a call and must not reach into it, nor change because of it.

torch keeps some of it for each thread (a default device, autocast, inference mode): a call puts its
own over that. The rest it keeps for the whole process: how exactly products of float32 are computed
is held at its default while some call runs, and what transformers and torch's export set while they
work goes through one lock.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

P = ParamSpec("P")
T = TypeVar("T")

# Code of transformers and of torch's export reads and writes a default dtype, patches and flags of
# the whole process. Reentrant, since tracing a model builds parts of it.
foreign = threading.RLock()
_local = threading.local()


def undisturbed(function: Callable[P, T]) -> Callable[P, T]:
    """The function, whose results depend on its arguments alone."""

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())  # as inference mode has it
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            if default_dtype() != torch.float32:
                stack.enter_context(Floats(torch.float32))
            stack.enter_context(_exact.held())
            return function(*args, **kwargs)

    return alone


def default_dtype() -> torch.dtype:
    """What floating-point tensors of this thread are made in when nothing else is said."""
    return getattr(_local, "dtype", None) or torch.get_default_dtype()


class Floats(TorchFunctionMode):
    """Floating-point tensors are made in a dtype where nothing else is said: torch's default dtype,
    of this thread alone. What makes floats of integers (a quotient, a root) makes them in it
    too."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.before = dtype, default_dtype()

    def __enter__(self) -> "Floats":
        self.outer, _local.dtype = getattr(_local, "dtype", None), self.dtype
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _local.dtype = self.outer
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is not None or any(isinstance(a, torch.dtype) for a in args):
            return func(*args, **kwargs)
        if func in EMPTY:
            return func(*args, **{**kwargs, "dtype": self.dtype})
        made = func(*args, **kwargs)
        # the process's own may be another by now, as while another thread loads a model
        if (
            func in CONVERSIONS
            or not isinstance(made, Tensor)
            or made.dtype not in (self.before, torch.get_default_dtype())
        ):
            return made
        taken = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(leaf.is_floating_point() or leaf is made for leaf in taken):
            return made
        if not taken:
            return func(*args, **{**kwargs, "dtype": self.dtype})
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(self.dtype), (args, kwargs))
        return func(*args, **kwargs)


# what makes floats whatever it is given, and what is told in which dtype
EMPTY = {
    torch.empty,
    torch.zeros,
    torch.ones,
    torch.rand,
    torch.randn,
    torch.eye,
    torch.linspace,
    torch.logspace,
    torch.empty_strided,
    torch.normal,
}
CONVERSIONS = {
    Tensor.float,
    Tensor.double,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.to,
    Tensor.type,
    Tensor.type_as,
    Tensor.view,
    torch.from_numpy,
    torch.frombuffer,
}


class _Exact:
    """Products of float32 in float32 for as long as somebody asks for it; then as they were
    before."""

    def __init__(self) -> None:
        self.lock, self.holders = threading.Lock(), 0
        self.before: list[tuple[Any, str]] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        with self.lock:
            if not self.holders:
                self.before = [(backend, backend.fp32_precision) for backend in _backends()]
                _set([(b, "ieee") for b, was in self.before if was not in ("none", "ieee")])
            self.holders += 1
        try:
            yield
        finally:
            with self.lock:
                self.holders -= 1
                if not self.holders:
                    _set([(b, was) for b, was in self.before if was not in ("none", "ieee")])


def _backends() -> list[Any]:
    backends = torch.backends
    return [backends.cuda.matmul, backends.mkldnn.matmul]  # type: ignore[attr-defined]


def _set(precisions: list[tuple[Any, str]]) -> None:
    for backend, precision in precisions:
        backend.fp32_precision = precision


_exact = _Exact()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that modules of this thread are given have no memory, and those of tied modules
    are not one object; buffers stay what they are."""
    _local.on_meta = True
    try:
        yield
    finally:
        _local.on_meta = False


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or not getattr(_local, "on_meta", False):
        return None  # as it is
    empty = type(parameter)(parameter.to("meta"), requires_grad=parameter.requires_grad)
    vars(empty).update(vars(parameter))
    return empty


modules.register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]
