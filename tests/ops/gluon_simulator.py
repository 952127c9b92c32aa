"""Runs the Gluon kernels of this repository on a CPU, as badly timed as a GPU may run them.

Triton's interpreter does not know Gluon. `install()`, called before a kernel is imported, puts stand-ins in the place of
triton's Gluon: programs and the roles of a program become threads, tensors those of torch. What a GPU does in its own time
happens late here. A copy into shared memory leaves NaN until it arrives; a copy out of it reads its source some time
after; a product reads its operands when it is waited for. So a tile that is freed too early, a wait left out, a wrong
phase or count gives NaN, a deadlock or an error instead of the right result.

Not seen: the threads within one warpgroup (they are one here, so a barrier between them is not missed), the order in which
two copies to one place of a tensor arrive (waiting for copies out ends on a GPU when their sources have been read, here
when they are done), layouts, registers, the size of shared memory, and what the compiler makes of it.
"""

from __future__ import annotations

import importlib
import math
import operator
import random
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MULTIPROCESSORS = 2
"""Programs of a persistent kernel."""
MAX_DELAY = 0.002
"""Seconds that a copy may be late; one in ten is."""
PATIENCE = 60.0
"""Seconds of waiting for one phase after which it will not come."""
SWIZZLED = 64
"""Columns of 16 bits that lie together in shared memory: wider rows are cut into parts of so many."""


class Scalar(int):
    """An integer of a kernel."""

    @property
    def value(self) -> int:
        return int(self)

    def to(self, dtype: torch.dtype) -> Scalar | float:
        if dtype.is_floating_point:
            return float(self)
        return Scalar((int(self) + 2**31) % 2**32 - 2**31) if dtype == torch.int32 else self


def _int_operator(name: str) -> Callable:
    def method(self: Scalar, other: Any) -> Any:
        result = getattr(int, name)(self, other)
        return Scalar(result) if type(result) is int else result

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "rshift", "lshift"):
    for _form in (f"__{_name}__", f"__r{_name}__"):
        setattr(Scalar, _form, _int_operator(_form))


class Value:
    """A tensor in registers. `pending`: the product that will give it, until that is waited for."""

    def __init__(self, tensor: Any, pending: Callable[[], None] | None = None) -> None:
        self.tensor, self.pending = tensor, pending

    @property
    def dtype(self) -> torch.dtype:
        return read(self).dtype

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return Value(read(self).view(dtype) if bitcast else read(self).to(dtype))

    def reshape(self, shape: list[int]) -> Value:
        return Value(read(self).reshape(shape))

    def __getitem__(self, places: Any) -> Value:
        return Value(read(self)[places])

    __hash__ = object.__hash__


def read(x: Any) -> Any:
    """The tensor of a value, anything else as it is."""
    if isinstance(x, Value):
        assert x.pending is None, "the result of a product is used before it has been waited for"
        return x.tensor
    return x


def _value_operator(function: Callable, swapped: bool) -> Callable:
    def method(self: Value, other: Any) -> Value:
        a, b = read(self), read(other)
        return Value(function(b, a) if swapped else function(a, b))

    return method


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "mod",
    "lt",
    "gt",
    "le",
    "ge",
    "eq",
    "ne",
    "and_",
    "or_",
    "rshift",
    "lshift",
):
    _function = getattr(operator, _name)
    setattr(Value, f"__{_name.strip('_')}__", _value_operator(_function, False))
    setattr(Value, f"__r{_name.strip('_')}__", _value_operator(_function, True))


class Pointer:
    """Into the memory of a tensor, in elements from its start."""

    def __init__(self, memory: Tensor, offset: Any) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, steps: Any) -> Pointer:
        return Pointer(self.memory, read(self.offset) + read(steps))


class Barrier:
    """An mbarrier: its phase ends when all have arrived and all bytes are there."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.phase, self.count, self.missing, self.bytes = 0, 0, 0, 0

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def change(self, arrivals: int, more_bytes: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += more_bytes
            assert self.missing >= 0, "more have arrived at a barrier than it counts"
            if self.missing == 0 and self.bytes == 0:
                self.phase ^= 1
                self.missing = self.count
                self.changed.notify_all()

    def wait(self, phase: int) -> None:
        end = time.monotonic() + PATIENCE
        with self.changed:
            while self.phase == phase:
                if _failed.is_set():
                    raise SystemExit
                assert time.monotonic() < end, "deadlock: a phase of a barrier never ended"
                self.changed.wait(0.2)


class Shared:
    """Shared memory as `[first, ..., rows, columns]`; columns beyond 64 lie in parts, as TMA with swizzle leaves them."""

    def __init__(self, dtype: torch.dtype, memory: Tensor, offset: int, shape: list[int]) -> None:
        self.dtype, self.layout = dtype, None
        self.memory, self.offset, self.shape = memory, offset, shape
        self.views: tuple[Callable[[Tensor], Tensor], ...] = ()

    @property
    def tensor(self) -> Tensor:
        """A view, but a copy where rows are cut into parts."""
        size = math.prod(self.shape)
        flat = self.memory[self.offset : self.offset + size]
        columns = self.shape[-1]
        if len(self.shape) > 1 and columns > SWIZZLED:
            parts = flat.view(-1, columns // SWIZZLED, self.shape[-2], SWIZZLED)
            flat = parts.transpose(1, 2)
        result = flat.reshape(self.shape)
        for view in self.views:
            result = view(result)
        return result

    def write(self, content: Tensor) -> None:
        size, columns = math.prod(self.shape), self.shape[-1]
        content = content.reshape(self.shape).to(self.dtype)
        if len(self.shape) > 1 and columns > SWIZZLED:
            content = content.reshape(-1, self.shape[-2], columns // SWIZZLED, SWIZZLED).transpose(1, 2)
        self.memory[self.offset : self.offset + size] = content.reshape(-1)

    def index(self, place: int) -> Shared:
        assert 0 <= place < self.shape[0], f"place {place} of {self.shape[0]}"
        return Shared(self.dtype, self.memory, self.offset + int(place) * math.prod(self.shape[1:]), self.shape[1:])

    def _view(self, view: Callable[[Tensor], Tensor]) -> Shared:
        result = Shared(self.dtype, self.memory, self.offset, self.shape)
        result.views = (*self.views, view)
        return result

    def reshape(self, shape: list[int]) -> Shared:
        return self._view(lambda x: x.reshape(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return self._view(lambda x: x.permute(order))

    def load(self, layout: Any = None) -> Value:
        return Value(self.tensor.clone())

    def store(self, content: Value) -> None:
        self.write(read(content))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        assert dtype == self.dtype
        return Shared(dtype, self.memory, self.offset, [int(x) for x in shape])


class Barriers:
    def __init__(self, number: int) -> None:
        self.barriers = [Barrier() for _ in range(number)]

    def index(self, place: int) -> Barrier:
        return self.barriers[int(place)]


class TensorDescriptor:
    """A tensor that is copied in boxes; what lies outside it is 0 in shared memory and is not written back."""

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block_shape: list[int], layout: Any = None):
        self.tensor, self.block_shape = torch.as_strided(base, shape, strides), block_shape
        self.dtype, self.layout = base.dtype, None
        self.block_type = types.SimpleNamespace(nbytes=math.prod(block_shape) * base.element_size())

    def boxes(self, start: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where the box that starts there is in the tensor, and which part of it that is."""
        assert all(x >= 0 for x in start)
        inside = [
            max(0, min(b, n - int(x))) for x, b, n in zip(start, self.block_shape, self.tensor.shape, strict=True)
        ]
        return tuple(slice(int(x), int(x) + n) for x, n in zip(start, inside, strict=True)), tuple(
            slice(0, n) for n in inside
        )


_thread = threading.local()
_failed = threading.Event()
_atomic = threading.Lock()


def _one(barrier: Any) -> Barrier:
    return barrier.barriers[0] if isinstance(barrier, Barriers) else barrier


class Copies:
    """What copies on its own: of all that is under way it does any one next."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: list[tuple[Callable[[], None], threading.Event]] = []
        threading.Thread(target=self._run, daemon=True).start()

    def start(self, copy: Callable[[], None]) -> threading.Event:
        done = threading.Event()
        with self.changed:
            self.waiting.append((copy, done))
            self.changed.notify()
        return done

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
            if random.random() < 0.1:
                time.sleep(random.random() * MAX_DELAY)
            with self.changed:
                copy, done = self.waiting.pop(random.randrange(len(self.waiting)))
            try:
                copy()
            except BaseException:
                traceback.print_exc()
                _failed.set()
            done.set()


_copies = Copies()


def tma_load(descriptor: TensorDescriptor, start: list[int], barrier: Any, target: Shared) -> None:
    assert list(target.shape) == list(descriptor.block_shape), (target.shape, descriptor.block_shape)
    poison = torch.nan if target.dtype.is_floating_point else 77
    target.write(torch.full(target.shape, poison, dtype=target.dtype))

    def copy() -> None:
        source, part = descriptor.boxes(start)
        box = torch.zeros(descriptor.block_shape, dtype=descriptor.dtype)
        box[part] = descriptor.tensor[source]
        target.write(box)
        _one(barrier).change(0, -descriptor.block_type.nbytes)

    _copies.start(copy)


def tma_store(descriptor: TensorDescriptor, start: list[int], source: Shared) -> None:
    def copy() -> None:
        target, part = descriptor.boxes(start)
        descriptor.tensor[target] = source.tensor.reshape(descriptor.block_shape)[part]

    _thread.__dict__.setdefault("stores", []).append(_copies.start(copy))


def store_wait(pendings: int) -> None:
    for done in _thread.__dict__.get("stores", []):
        done.wait()
    _thread.stores = []


def warpgroup_mma(a: Any, b: Shared, acc: Value, use_acc: bool = True, is_async: bool = False) -> Value:
    assert is_async
    if isinstance(a, Value):
        read(a)
    result = Value(None)

    def multiply() -> None:
        left, right = (x.tensor for x in (a, b))
        wide = torch.float64 if not left.dtype.is_floating_point else torch.float32
        product = left.to(wide) @ right.to(wide)
        # Products of one warpgroup end in their order, so that of an earlier one is there.
        total = product.to(acc.tensor.dtype) + acc.tensor if use_acc else product
        result.tensor = total.to(torch.int32) if wide is torch.float64 else total
        result.pending = None

    result.pending = multiply
    _thread.__dict__.setdefault("products", []).append(multiply)
    return result


def warpgroup_mma_wait(pendings: int, deps: list[Value]) -> Any:
    products = _thread.__dict__.setdefault("products", [])
    while len(products) > pendings:
        products.pop(0)()
    return deps[0] if len(deps) == 1 else tuple(deps)


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
    offset, mask = read(pointer.offset), read(mask)
    if isinstance(offset, Tensor):
        if mask is None:
            return Value(pointer.memory[offset])
        offset, mask = torch.broadcast_tensors(offset, torch.as_tensor(mask))
        loaded = pointer.memory[torch.where(mask, offset, 0)]
        return Value(torch.where(mask, loaded, torch.as_tensor(other, dtype=loaded.dtype)))
    if mask is not None and not mask:
        return Scalar(other) if isinstance(other, int) else other
    assert 0 <= offset < pointer.memory.numel(), "read outside of a tensor"
    number = pointer.memory[int(offset)].item()
    return Scalar(number) if isinstance(number, int) else number


def store(pointer: Pointer, content: Any, mask: Any = None) -> None:
    offset, content, mask = (
        torch.as_tensor(read(x)) for x in (pointer.offset, content, True if mask is None else mask)
    )
    offset, content, mask = torch.broadcast_tensors(offset, content, mask)
    pointer.memory[offset[mask]] = content[mask].to(pointer.memory.dtype)


def atomic_add(pointer: Pointer, number: int, sem: str | None = None) -> Scalar:
    with _atomic:
        before = int(pointer.memory[int(pointer.offset)])
        pointer.memory[int(pointer.offset)] += number
    return Scalar(before)


def _reduction(function: Callable) -> Callable:
    def reduce(x: Value, axis: int) -> Any:
        result = function(read(x), axis)
        return Scalar(result.item()) if result.ndim == 0 and not result.dtype.is_floating_point else Value(result)

    return reduce


def _pairwise(of_tensors: Callable, of_numbers: Callable) -> Callable:
    def function(a: Any, b: Any) -> Any:
        a, b = read(a), read(b)
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            return Scalar(of_numbers(a, b))
        dtype = (a if isinstance(a, Tensor) else b).dtype
        return Value(of_tensors(*(torch.as_tensor(x, dtype=dtype) for x in (a, b))))

    return function


def where(condition: Any, a: Any, b: Any) -> Any:
    condition = read(condition)
    if not isinstance(condition, Tensor):
        return a if condition else b
    return Value(torch.where(condition, read(a), read(b)))


def allocate_shared_memory(dtype: torch.dtype, shape: list[int], layout: Any = None) -> Shared | Barriers:
    if dtype == torch.int64:
        return Barriers(int(shape[0]))
    shape = [int(x) for x in shape]
    fill = torch.nan if dtype.is_floating_point else -12345
    return Shared(dtype, torch.full([math.prod(shape)], fill, dtype=dtype), 0, shape)


def _run_all(calls: list[Callable[[], None]], program: int | None = None) -> None:
    """Each in a thread of its own; the first error ends all."""
    errors: list[str] = []

    def guarded(call: Callable[[], None], number: int) -> None:
        _thread.program = number if program is None else program
        try:
            call()
        except SystemExit:
            pass  # Ended because another thread failed, which says why.
        except BaseException:
            errors.append(traceback.format_exc())
            _failed.set()

    with torch.no_grad():
        threads = [threading.Thread(target=guarded, args=(call, i)) for i, call in enumerate(calls)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise RuntimeError("\n".join(errors))


def warp_specialize(roles: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]) -> None:
    _run_all([lambda f=f, a=a: f(*a) for f, a in roles], _thread.program)


class Function:
    """What `jit` makes: called from a kernel it is itself, with a grid it launches one thread for each program."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **options)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(*args: Any, **options: Any) -> None:
            for compiler_option in ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg"):
                options.pop(compiler_option, None)
            converted = [_argument(x) for x in args]
            _failed.clear()
            _run_all([lambda: self.function(*converted, **options)] * int(grid[0]))

        return launch


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        length = x.untyped_storage().nbytes() // x.element_size()
        return Pointer(torch.as_strided(x, [length], [1], 0), Scalar(x.storage_offset()))
    return Scalar(x) if type(x) is int else x


def rounding(asm: str, constraints: str, args: list, *, dtype: torch.dtype, is_pure: bool, pack: int) -> Value:
    """The one thing that kernels write in the language of the machine."""
    assert asm.startswith("cvt.rn.") and pack == 2, asm
    return Value(read(args[0]).to(dtype))


def jit(function: Callable | None = None, **options: Any) -> Any:
    return Function(function) if function is not None else Function


class _Anything:
    """A layout, or another thing that only the compiler asks about."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self

    @staticmethod
    def get_default_for(*args: Any) -> Any:
        return None


def install() -> None:
    """Put the stand-ins in the place of triton's Gluon, in this process. Plain Triton stays: its interpreter runs the other
    kernels of a call (TRITON_INTERPRET=1)."""
    language: dict[str, Any] = dict(
        constexpr=lambda x: Scalar(x) if type(x) is int else x, static_range=range,
        int8=torch.int8, int32=torch.int32, int64=torch.int64,
        float16=torch.float16, bfloat16=torch.bfloat16, float32=torch.float32,
        load=load, store=store, atomic_add=atomic_add, where=where,
        maximum=_pairwise(torch.maximum, max), minimum=_pairwise(torch.minimum, min),
        max=_reduction(lambda x, axis: x.amax(axis)), sum=_reduction(lambda x, axis: x.sum(axis, dtype=x.dtype)),
        exp=lambda x: Value(torch.exp(read(x))), exp2=lambda x: Value(torch.exp2(read(x))),
        log=lambda x: Value(torch.log(read(x))), log2=lambda x: Value(torch.log2(read(x))),
        full=lambda shape, number, dtype, layout=None: Value(torch.full(shape, read(number), dtype=dtype)),
        broadcast=lambda x, other: (Value(torch.zeros_like(read(other)) + read(x)), other),
        zeros=lambda shape, dtype, layout=None: Value(torch.zeros([int(x) for x in shape], dtype=dtype)),
        arange=lambda start, end, layout=None: Value(torch.arange(start, end)),
        inline_asm_elementwise=rounding, convert_layout=lambda x, layout: x, program_id=lambda axis: Scalar(_thread.program),
        allocate_shared_memory=allocate_shared_memory, warp_specialize=warp_specialize, shared_memory_descriptor=Shared,
        thread_barrier=lambda: None, barrier=lambda: None,
        **dict.fromkeys(
            ("NVMMASharedLayout", "NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout",
             "SwizzledSharedLayout"),
            _Anything,
        ),
    )  # fmt: skip
    mbarrier = types.SimpleNamespace(
        MBarrierLayout=_Anything,
        init=lambda barrier, count: _one(barrier).init(int(count)),
        wait=lambda barrier, phase: _one(barrier).wait(int(phase)),
        arrive=lambda barrier, count=1: _one(barrier).change(count, 0),
        expect=lambda barrier, size: _one(barrier).change(1, int(size)),
    )
    tma = types.SimpleNamespace(
        async_copy_global_to_shared=tma_load, async_copy_shared_to_global=tma_store, store_wait=store_wait
    )
    hopper = dict(
        fence_async_shared=lambda: None, mbarrier=mbarrier, tma=tma,
        warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait,
    )  # fmt: skip
    modules = {
        "gluon": dict(jit=jit, constexpr_function=lambda function: function),
        "gluon.language": language,
        "gluon.language.nvidia": {},
        "gluon.language.nvidia.hopper": hopper,
        "gluon.nvidia": {},
        "gluon.nvidia.hopper": dict(TensorDescriptor=TensorDescriptor),
    }
    # What looks at arguments finds Gluon's classes at its first call, and needs the real ones.
    importlib.import_module("triton.runtime.jit").mangle_type(torch.empty(1))
    for name, content in modules.items():
        module = types.ModuleType(f"triton.experimental.{name}")
        module.__dict__.update(content, __path__=[])
        sys.modules[module.__name__] = module
        parent, _, child = module.__name__.rpartition(".")
        setattr(importlib.import_module(parent), child, module)
    # No such device: what launches a kernel asks for its size and makes it the current one.
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
