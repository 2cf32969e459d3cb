"""A stand-in for a CUDA GPU: a pytest plugin with which tests/gpu runs on a machine without one.

    PYTHONPATH=tests python -m pytest -p support.cpu_as_gpu tests/gpu

A tensor of the device says that it is on cuda:0, so autograd, autocast and the code under test take it for one; its
operations are done on the CPU. Like a GPU it refuses tensors of two devices in one operation, and
`torch.cuda.set_sync_debug_mode("error")` makes an error of everything for which the host would wait: reading a value,
a copy that blocks, a shape that depends on values. `torch.cuda.set_per_process_memory_fraction` limits the memory that
its tensors hold. Left to a real GPU are its kernels, fragments of its memory, and the order of its streams: everything
here happens at once, in the order of the program.

`__torch_dispatch__` and torch.library are PyTorch's documented extension points. What is not: that a device is there
at all is said in C++ (cpu_as_gpu.cpp), before PyTorch asks, and PyTorch's Python must not initialize CUDA.
"""

import ctypes
import subprocess
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


def _load() -> None:
    """Compile cpu_as_gpu.cpp and load it, which must come before `import torch`."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_folder = Path(spec.origin).parent
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/gpu.so"
        lib = torch_folder / "lib"
        command = [
            "g++",
            "-shared",
            "-fPIC",
            "-std=c++20",
            f"-I{torch_folder}/include",
            str(source),
            "-o",
            out,
        ]
        subprocess.run([*command, f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"], check=True)
        ctypes.CDLL(out)


_load()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten  # noqa: E402

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense,
    aten.bincount,
    aten.equal,
    aten.masked_select,
    aten.nonzero,
    aten._unique2,
    aten.unique_dim,
}
"""Operations whose result, or the size of it, the host has to know."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy_, aten._foreach_copy_}
sync_debug_mode = "default"


class Memory:
    """The memory of the device: tensors of one storage count once."""

    total = 80 << 30

    def __init__(self) -> None:
        self.limit = self.total
        self.held = 0
        self.peak = 0
        self._tensors = Counter[int]()

    def add(self, tensor: "OnGpu") -> None:
        """Count a new tensor until it is freed; torch.OutOfMemoryError beyond the limit."""
        storage = tensor.values.untyped_storage()
        place = storage.data_ptr()
        if not self._tensors[place]:
            if self.held + storage.nbytes() > self.limit:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory: {self.held} of {self.limit} bytes are held"
                )
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
        self._tensors[place] += 1
        weakref.finalize(tensor, self._free, place, storage.nbytes()).atexit = False

    def _free(self, place: int, num_bytes: int) -> None:
        self._tensors[place] -= 1
        if not self._tensors[place]:
            self.held -= num_bytes

    def set_fraction(self, fraction: float) -> None:
        self.limit = int(fraction * self.total)

    def reset_peak(self) -> None:
        self.peak = self.held


memory = Memory()


class OnGpu(Tensor):
    """A tensor of the device; `values` is the CPU's tensor behind it."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnGpu":
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=GPU, **layout)
        made.values = values
        memory.add(made)
        return made

    def __repr__(self) -> str:
        return f"OnGpu({self.values})"

    def tolist(self) -> Any:  # PyTorch refuses it for subclasses
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Do an operation on the CPU, and put its results on the device that they belong to."""
    flat, tree = tree_flatten((args, dict(kwargs)))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, OnGpu)]
    wanted = kwargs.get("device")
    to_gpu = bool(ours) if wanted is None else torch.device(wanted).type == GPU.type
    kind = function.overloadpacket
    if kind is aten.record_stream:
        return None
    if kind is aten._fused_sdp_choice:
        return 0  # the kernel in plain operations: the fused ones are chosen by device
    places = {isinstance(x, OnGpu) for x in tensors} | ({to_gpu} if kind is aten._to_copy else set())
    if kind in COPIES:
        waits = len(places) == 2 and not _non_blocking(function, args, kwargs)
    else:
        waits = kind in WAITS or (kind in INDEXING and any(_is_unknown(x) for x in args[1]))
        if len(places) == 2:
            _check_devices(function, args, tensors)
    if True in places and waits and sync_debug_mode == "error":
        raise RuntimeError(f"{function}: the host would wait for the GPU")
    of_values = {id(x.values): x for x in ours}
    plain_args, plain_kwargs = tree_unflatten([x.values if isinstance(x, OnGpu) else x for x in flat], tree)
    if wanted is not None:
        plain_kwargs["device"] = CPU
    out = function(*plain_args, **plain_kwargs)
    if kind is aten.copy_:
        return args[0]

    def put(x: Any) -> Any:
        if not isinstance(x, Tensor) or not to_gpu:
            return x
        return of_values[id(x)] if id(x) in of_values else OnGpu(x)

    return tree_map(put, out)


def _new(function: Any, *args: Any, **kwargs: Any) -> OnGpu:
    return OnGpu(function(*args, **kwargs | {"device": CPU}))


def _check_devices(function: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Raise an error for tensors of two devices; a GPU takes scalars and indices from the host."""
    if function.overloadpacket in INDEXING and isinstance(args[0], OnGpu):
        return
    strangers = [x for x in tensors if not isinstance(x, OnGpu)]
    written = function._schema.is_mutable and any(x is args[0] for x in strangers)
    if written or any(x.ndim > 0 for x in strangers):
        shapes = [tuple(x.shape) for x in strangers]
        raise RuntimeError(f"{function}: tensors on cuda:0 and on the CPU {shapes}")


def _is_unknown(index: Tensor | None) -> bool:
    """Whether an index is a mask, whose number of elements the host has to read, or has to be copied first."""
    return index is not None and (index.dtype == torch.bool or not isinstance(index, OnGpu))


def _non_blocking(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    names = [argument.name for argument in function._schema.arguments]
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("non_blocking"))


def _set_sync_debug_mode(mode: str) -> None:
    global sync_debug_mode
    sync_debug_mode = mode


NAMES = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "get_device_name": lambda *_: "NVIDIA H100 80GB HBM3",
    "set_sync_debug_mode": _set_sync_debug_mode,
    "set_per_process_memory_fraction": memory.set_fraction,
    "mem_get_info": lambda *_: (memory.total - memory.held, memory.total),
    "max_memory_allocated": lambda *_: memory.peak,
    "reset_peak_memory_stats": lambda *_: memory.reset_peak(),
}
"""Names in torch.cuda, and what they are here."""


@pytest.fixture(autouse=True, scope="session")
def cpu_as_gpu() -> Iterator[None]:
    """Make the device that of all tests."""
    # `param.data = other` keeps the old object.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    # torch.tensor(..., device="cuda") is a CPU tensor that is copied.
    torch._C._set_only_lift_cpu_tensors(True)
    library = torch.library.Library("aten", "IMPL", "CUDA")
    # Every new tensor begins as one of these two.
    library.impl("empty.memory_format", partial(_new, aten.empty))
    library.impl("empty_strided", partial(_new, aten.empty_strided))
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in NAMES.items():
            patch.setattr(torch.cuda, name, stand_in)
        # No kernels are compiled for it.
        patch.setattr("ddpm.training.loop.C_COMPILERS", ())
        yield
