"""A CUDA device that is faked in this process: its tensors say cuda:0 and live in RAM.

`start()` makes `torch.device("cuda")` work without a GPU. Operators compute on the CPU, a tensor of
the CPU beside one of the device is refused as torch refuses it, bytes held are counted, events
carry the host's clock. Nothing overlaps, and no kernel of a package can run: those raise. What it
is for: that a program's GPU path runs at all. A process that called `start()` is good for nothing
else.
"""

import time
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

NAME = "NVIDIA Faked GPU"
CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
TOTAL_BYTES = 80 * 2**30
MIXED = (
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
)
# Operators that take tensors of both devices (indices and what is copied may be the CPU's).
_MAY_MIX = {"_to_copy", "to", "copy_", "index", "index_put", "index_put_"}


class Memory:
    """Bytes held by the device's tensors, and their peak."""

    held = 0
    peak = 0

    @classmethod
    def take(cls, num_bytes: int) -> None:
        cls.held += num_bytes
        cls.peak = max(cls.peak, cls.held)

    @classmethod
    def reset_peak(cls, device: Any = None) -> None:
        cls.peak = cls.held


class Room:
    """The bytes of one storage, held for as long as a tensor looks at it."""

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes
        Memory.take(num_bytes)

    def __del__(self) -> None:
        Memory.held -= self.num_bytes


class CudaTensor(torch.Tensor):
    """A tensor of the faked device: `held` is the CPU tensor with its values."""

    held: torch.Tensor
    room: Room
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor, room: Room | None = None) -> "CudaTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, layout=held.layout, device=CUDA, requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held
        made.room = room or Room(held.untyped_storage().nbytes())
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None  # Module.to swaps such a parameter instead of writing its .data

    @staticmethod
    def __tensor_unflatten__(parts: Any, context: Any, size: Any, stride: Any) -> "CudaTensor":
        return CudaTensor(parts["held"])

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        return self.held.numpy(force=True)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"on cuda:0: {self.held!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Sees what makes or moves tensors, whose arguments need not be the device's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = (torch.Tensor, torch.nn.Parameter, CudaTensor)
        if any(kind not in known for kind in types):
            return NotImplemented  # a quantised tensor does it by itself, on its own parts
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` on the CPU, its results on the device that torch would put them on."""
    found: list[torch.Tensor] = []
    tree_map(lambda x: found.append(x) if isinstance(x, torch.Tensor) else None, (args, kwargs))
    ours = [x for x in found if isinstance(x, CudaTensor)]
    name = func.__name__.split(".")[0]
    if ours and name not in _MAY_MIX and any(x.ndim and x.device == CPU for x in found):
        raise RuntimeError(f"{MIXED} (in {func})")
    devices = (x for x in args if isinstance(x, torch.device))  # as `to` has it in inference mode
    device = kwargs.get("device") or next(devices, None)
    on_cuda = torch.device(device).type == "cuda" if device is not None else bool(ours)
    if name in ("copy_", "index_put_"):
        on_cuda = isinstance(args[0], CudaTensor)
    plain_args, plain_kwargs = tree_map(_to_cpu, (args, kwargs))
    out = _OPERATORS.get(name, func)(*plain_args, **plain_kwargs)
    if not on_cuda:
        return out
    same = {id(x.held): x for x in ours}
    bases = {x.held.untyped_storage().data_ptr(): x for x in ours}

    def placed(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, CudaTensor):
            return x
        if id(x) in same:
            return same[id(x)]
        base = bases.get(x.untyped_storage().data_ptr())
        if base is None:
            return CudaTensor(x)
        with torch.inference_mode(base.is_inference()):  # a view is what its base is
            return CudaTensor(x, base.room)

    return tree_map(placed, out)


def _to_cpu(x: Any) -> Any:
    if isinstance(x, CudaTensor):
        return x.held
    if isinstance(x, torch.device) and x.type == "cuda":
        return CPU
    return x


# --- operators that exist on a GPU only


def _attend(
    q: Any, k: Any, v: Any, bias: Any = None, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, log-sum-exp) by definition."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q.float() * scale) @ k.float().transpose(-1, -2)
    scores = scores if bias is None else scores + bias.float()
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def _cudnn(q: Any, k: Any, v: Any, bias: Any, want_lse: bool, *_: Any, scale: Any = None) -> Any:
    out, lse = _attend(q, k, v, bias, scale)
    return out, lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], None, None, None


def _efficient(q: Any, k: Any, v: Any, bias: Any, *_: Any, scale: Any = None) -> Any:
    return (*_attend(q, k, v, bias, scale), None, None)


def _flash(q: Any, k: Any, v: Any, *_: Any, scale: Any = None) -> Any:
    return (*_attend(q, k, v, None, scale), None, None, q.shape[2], k.shape[2], None, None, None)


_OPERATORS = {
    "_fused_sdp_choice": lambda *args, **kwargs: 0,  # plain mathematics
    "_scaled_dot_product_cudnn_attention": _cudnn,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_flash_attention": _flash,
}


# --- torch.cuda


class Event:
    """An event that carries the host's clock; the device is always finished."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any):
        self._timed, self._at = enable_timing, None

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        if not (self._timed and end._timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._at is None or end._at is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return (end._at - self._at) * 1e3

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None: ...


class Stream:
    """A stream on which everything is finished at once."""

    device, device_index, cuda_stream, priority = CUDA, 0, 0, 0

    def __init__(self, *_: Any, **__: Any):
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: "Stream") -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event


_MAIN = Stream()


def _statistics(device: Any = None) -> dict[str, int]:
    names = ("active_bytes", "allocated_bytes", "reserved_bytes")
    return {
        f"{name}.all.{key}": value
        for name in names
        for key, value in (("current", Memory.held), ("peak", Memory.peak))
    }


def start(capability: tuple[int, int] = (9, 0)) -> None:
    """Fake the device for the rest of this process. capability: of the GPU, as torch gives it."""
    facts = SimpleNamespace(
        name=NAME, major=capability[0], minor=capability[1], total_memory=TOTAL_BYTES,
        multi_processor_count=108, gcnArchName="", L2_cache_size=40 << 20, warp_size=32,
        shared_memory_per_block_optin=166912, uuid="0", is_integrated=False,
    )  # fmt: skip
    torch.version.cuda = torch.version.cuda or "12.8"
    faked: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_exchange_device": lambda index: 0,  # of `with torch.cuda.device(...)`
        "_maybe_exchange_device": lambda index: 0,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: facts,
        "get_allocator_backend": lambda: "native",
        "is_bf16_supported": lambda *args, **kwargs: capability >= (8, 0),
        "mem_get_info": lambda device=None: (TOTAL_BYTES - Memory.held, TOTAL_BYTES),
        "memory_stats": _statistics,
        "memory_allocated": lambda device=None: Memory.held,
        "memory_reserved": lambda device=None: Memory.held,
        "max_memory_allocated": lambda device=None: Memory.peak,
        "max_memory_reserved": lambda device=None: Memory.peak,
        "reset_peak_memory_stats": Memory.reset_peak,
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda device=None: _MAIN,
        "default_stream": lambda device=None: _MAIN,
        "stream": lambda stream: stream if stream is not None else _MAIN,
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0
        ),
        "Event": Event,
        "Stream": Stream,
        "manual_seed_all": lambda seed: None,
        "manual_seed": lambda seed: None,
    }
    for name, value in faked.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_getDevice = lambda: 0  # type: ignore[attr-defined]
    torch._C._ensureCUDADeviceGuardSet()  # torch's own no-op guard for machines without a GPU
    compatible = torch._has_compatible_shallow_copy_type

    def same_kind(
        input: torch.Tensor, from_: torch.Tensor
    ) -> bool:  # torch.compile knows its names
        mixed = isinstance(input, CudaTensor) != isinstance(from_, CudaTensor)
        return not mixed and compatible(input, from_)

    torch._has_compatible_shallow_copy_type = same_kind  # type: ignore[assignment]
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(data, device=...) moves what it made
    generator = torch.Generator

    class Generator(generator):  # type: ignore[valid-type, misc]
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator(CPU)

    torch.Generator = Generator  # type: ignore[misc]
    torch.Tensor.cuda = lambda self, *_, **__: self.to(CUDA)  # type: ignore[method-assign]
    _Everywhere().__enter__()
