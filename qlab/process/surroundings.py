"""Settings of torch around a call of qlab: they do not change its result, and it does not change
them.

torch keeps some settings for each thread (a default device, autocast, inference mode): a call sets
its own for its duration. Others belong to the whole process: the precision of float32 products is
held at its default while any call runs, and calls into transformers and torch's export, which set
more of them, go through one lock.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from qlab.errors import QlabError

P = ParamSpec("P")
T = TypeVar("T")

# Code of transformers and of torch's export reads and writes a default dtype, patches and flags of
# the whole process. The lock is reentrant because tracing a model builds parts of it.
foreign = threading.RLock()
_local = threading.local()
LARGE = 2**28  # bytes, more than what a model computes and holds as a buffer


def undisturbed(function: Callable[P, T]) -> Callable[P, T]:
    """The function, with results that depend on its arguments alone, not on settings of torch."""

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
            stack.enter_context(_exact.for_now())
            return function(*args, **kwargs)

    return alone


def streamed(function: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """The same of a generator: each of its steps runs undisturbed and without gradients, and what
    its caller does between two steps has the caller's settings."""
    end = object()

    @undisturbed
    @torch.no_grad()
    def step(items: Iterator[T]) -> T | object:
        return next(items, end)

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        with closing(function(*args, **kwargs)) as items:  # type: ignore[type-var]
            while True:
                item = step(items)
                if item is end:
                    return
                yield item  # type: ignore[misc]
                del item

    return alone


def default_dtype() -> torch.dtype:
    """The dtype of floating-point tensors that this thread makes without naming a dtype."""
    return getattr(_local, "dtype", None) or torch.get_default_dtype()


class Floats(TorchFunctionMode):
    """A default dtype of floating-point tensors for this thread alone; torch's own belongs to the
    process. Operations that make floats of integers (a quotient, a root) follow it too."""

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
        names_dtype = any(isinstance(argument, torch.dtype) for argument in args)
        if names_dtype or kwargs.get("dtype") is not None:
            return func(*args, **kwargs)
        if func in FACTORIES:
            return func(*args, **{**kwargs, "dtype": self.dtype})
        result = func(*args, **kwargs)
        if func in CONVERSIONS or not isinstance(result, Tensor) or not self._by_default(result):
            return result
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if any(tensor.is_floating_point() or tensor is result for tensor in tensors):
            return result
        if not tensors:
            return func(*args, **{**kwargs, "dtype": self.dtype})
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(self.dtype), (args, kwargs))
        return func(*args, **kwargs)

    def _by_default(self, result: Tensor) -> bool:
        """Whether a result may have its dtype from torch's default. That may have changed since
        this began, while another thread loads a model."""
        return result.dtype in (self.before, torch.get_default_dtype())


# Functions that make floats whatever their arguments are.
FACTORIES = {
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
# Functions that name the dtype of their result, or keep that of their argument.
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
    """Full precision of float32 products while any thread holds it; the precision from before when
    the last one lets go."""

    def __init__(self) -> None:
        self.lock, self.holders = threading.Lock(), 0
        self.reduced: list[tuple[Any, str]] = []  # backends and their precision from before

    @contextmanager
    def for_now(self) -> Iterator[None]:
        with self.lock:
            if not self.holders:
                precisions = [(backend, backend.fp32_precision) for backend in _backends()]
                self.reduced = [pair for pair in precisions if pair[1] not in ("none", "ieee")]
                _set([(backend, "ieee") for backend, _ in self.reduced])
            self.holders += 1
        try:
            yield
        finally:
            with self.lock:
                self.holders -= 1
                if not self.holders:
                    _set(self.reduced)


def _backends() -> list[Any]:
    backends = torch.backends
    return [backends.cuda.matmul, backends.mkldnn.matmul]  # type: ignore[attr-defined]


def _set(precisions: list[tuple[Any, str]]) -> None:
    for backend, precision in precisions:
        backend.fp32_precision = precision


_exact = _Exact()


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """A variable of the process's environment, which has its value back behind it. What reads it
    meanwhile in another thread reads this one too."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ |= {} if before is None else {name: before}


_counting = threading.Lock()


def by_itself() -> None:
    """Let torch's operations of this thread, which has just begun, run in it alone. Several such
    threads fill the processor, and a team of each would wait for work on the others' time."""

    def set_to(count: int) -> None:
        torch.set_num_threads(count)

    with _counting:
        before = torch.get_num_threads()
        set_to(1)
        # torch takes it for the number of threads that begin later, too
        later = threading.Thread(target=set_to, args=(before,))
        later.start()
        later.join()


M_MMAP_THRESHOLD = -3  # of glibc's mallopt
MAPPED = 1 << 20


def return_freed_memory(from_now_on: bool) -> None:
    """Give freed memory back to the system: glibc keeps what tokenizing, tracing and the embedding
    leave, a tenth of the peak of a small model. Other C libraries have no such calls.

    from_now_on: for the rest of the process, memory of `MAPPED` bytes and more is given back when
    it is freed. glibc keeps pieces of up to 32 MiB, which cost less to take again; where sums lie
    in files they are a sixth of the peak.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))
    if from_now_on and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED)


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """torch's own generators start from a seed, and have their states back behind it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def parameters_on_meta(most: int) -> Iterator[None]:
    """Parameters that this thread registers in modules become meta tensors, without memory. Buffers
    stay as they are. Tied modules get a parameter each. Refuses more than `most` of them."""
    _local.most, _local.left = most, most
    try:
        with _LargeOnMeta():
            yield
    finally:
        _local.left = None


class _LargeOnMeta(TorchFunctionMode):
    """Large tensors that are made without values take no memory from the beginning: a parameter
    would be asked of the system whole before it is registered."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            without_memory = func(*args, **{**kwargs, "device": "meta"})
            if without_memory.nbytes > LARGE:
                return without_memory
        return func(*args, **kwargs)


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """A hook of torch: the parameter to register instead, or None to register the one at hand."""
    if parameter is None or getattr(_local, "left", None) is None:
        return None
    _local.left -= 1
    if _local.left < 0:
        raise QlabError(
            f"config.json describes a model of more than {_local.most:,} parameters, which is more "
            "than its files hold tensors for; the one or the other is of another model"
        )
    empty = type(parameter)(parameter.to("meta"), requires_grad=parameter.requires_grad)
    vars(empty).update(vars(parameter))
    return empty


modules.register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]
