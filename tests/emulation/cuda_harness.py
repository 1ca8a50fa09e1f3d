"""Runs the CUDA kernels without a GPU: the product's own host code, its launches emulated.

A phase (``csrc/cuda/<arch>/<phase>``) is compiled to PTX and to host code; the latter is linked
with a fake runtime (``fake_cuda.cpp``). So split counts, grids, shared memory and tensor
maps are those of the product, and every launch is executed by the emulator on CPU tensors, with
its checks on (bounds, races, uninitialised shared memory, copies not waited for).

    phase = Phase("sm80", "decode", units=("launch", "bf16_d64"))
    result = emulate(phase, attention_call(q, k, v, head_map, causal=True))
    check(inputs, result)                      # the package's tolerance rule
    result.reports[0].bank_conflicts           # counters of each launch
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gqa_kernels.backends.reference.formula import reference_attention
from gqa_kernels.call.attention import AttentionCall
from gqa_kernels.native.schema import empty_output
from gqa_kernels.testing import assert_close, equivalent_forms, upcast
from tools import ptxsim

from .compiled_units import (
    CSRC,
    Replacement,
    host_unit,
    kernel_unit,
    link,
    source_tree,
    toolkit,
)
from .cuda_params import (
    DTYPES,
    PARAMS,
    POINTER,
    AppendParams,
    AttentionParams,
    BackwardParams,
    Strides,
)
from .fake_runtime import HOOK, LAUNCH_FAILURE, FakeEvent

HERE = Path(__file__).resolve().parent
MAP_MAGIC = b"GQA-TMAP"
SWIZZLES = ("none", "32B", "64B", "128B")  # in the order of CUtensorMapSwizzle


@dataclass
class Call:
    """Parameters and the tensors that they point into."""

    params: AttentionParams | BackwardParams | AppendParams
    tensors: dict[str, Tensor]

    @property
    def out(self) -> Tensor:
        return self.tensors["out"]

    @property
    def lse(self) -> Tensor:
        return self.tensors["lse"]


def make_call(
    inputs: AttentionCall,
    *,
    head_map: Tensor | None = None,
    page_table: Tensor | None = None,
    kv_begin: Tensor | None = None,
    q_offsets: Tensor | None = None,
    batch: int | None = None,
    max_q_len: int | None = None,
) -> Call:
    """What the host code passes to a phase for these inputs; outputs are full of NaN.

    Args:
        inputs: as the API makes them. With ``page_table`` its k and v are ``[P, H, page_size, D]``.
        head_map: int32 in place of the inputs' map, which can't hold invalid entries.
        page_table, kv_begin, q_offsets: int32, as in csrc/core/params.h.
        batch, max_q_len: of the sequences, where q is packed (``q_offsets``) or storage is paged.
    """
    out = empty_output(inputs.q, inputs.value_head_dim, inputs.bshd).fill_(torch.nan)
    lse = torch.full(inputs.q.shape[:3], torch.nan)
    if head_map is None:
        head_map = inputs.head_map_tensor.to(torch.int32)
    value_map = inputs.value_head_map_tensor
    tensors = {
        "q": inputs.q, "k": inputs.k, "v": inputs.v, "out": out, "lse": lse, "head_map": head_map,
        "value_head_map": None if value_map is None else value_map.to(torch.int32),
        "alibi_slopes": inputs.alibi_slopes, "sinks": inputs.sinks,
        "attn_mask": inputs.attn_mask, "kv_lengths": inputs.kv.kv_lengths,
        "page_table": page_table, "kv_begin": kv_begin, "q_offsets": q_offsets,
        "dropout_seed": inputs.dropout_seed,
    }  # fmt: skip
    tensors = {name: x for name, x in tensors.items() if x is not None}
    params = AttentionParams(
        batch=inputs.q.shape[0] if batch is None else batch,
        num_heads=inputs.q.shape[1],
        num_k_heads=inputs.k.shape[1],
        num_v_heads=inputs.v.shape[1],
        q_len=inputs.q.shape[2] if max_q_len is None else max_q_len,
        q_tokens=inputs.q.shape[2],
        kv_len=inputs.k.shape[2],
        head_dim=inputs.q.shape[3],
        value_head_dim=inputs.v.shape[3],
        scale=inputs.scale,
        softcap=inputs.options.softcap,
        window_left=inputs.options.window_left,
        window_right=inputs.options.window_right,
        dtype=DTYPES.index(inputs.dtype),
        k_dtype=DTYPES.index(inputs.dtype),
        v_dtype=DTYPES.index(inputs.dtype),
        page_size=inputs.k.shape[2],
        max_pages=1,
    )
    for name, x in tensors.items():
        setattr(params, name, x.data_ptr())
    for name in ("q", "k", "v", "out"):
        setattr(params, f"{name}_stride", Strides(*tensors[name].stride()[:3]))
    for name, prefix, dims in (
        ("alibi_slopes", "alibi", "bh"),
        ("attn_mask", "mask", "bhqk"),
        ("kv_lengths", "kv_lengths", "bh"),
        ("page_table", "page_table", "bhp"),
    ):
        if name in tensors:
            for dim, stride in zip(dims, tensors[name].stride(), strict=True):
                setattr(params, f"{prefix}_stride_{dim}", stride)
    if inputs.attn_mask is not None:
        params.mask_dtype = DTYPES.index(inputs.attn_mask.dtype)
    if inputs.dropout_seed is not None:
        params.dropout_threshold = int(inputs.options.dropout_p * 2**32)
        params.dropout_scale = 1 / (1 - inputs.options.dropout_p)
    if page_table is not None:
        params.num_pages, _, params.page_size, _ = inputs.k.shape
        params.max_pages = page_table.shape[2]
        params.kv_len = params.max_pages * params.page_size
    return Call(params, tensors)


@dataclass
class Result:
    """Outputs, the emulator's report of each launch, and the launches themselves.

    ``launches`` lists (kernel, grid, shared bytes).
    """

    out: Tensor
    lse: Tensor
    reports: list = field(default_factory=list)
    launches: list[tuple[str, tuple[int, ...], int]] = field(default_factory=list)


class Phase:
    """A compiled phase.

    Args:
        arch, name: ``csrc/cuda/<arch>/<name>``.
        units: stems of its .cu files to compile, those of ``instantiations/`` included; the host
            code must not need the others. Default: all of them.
        replace: (file name, old text, new text) to break the kernels with; every old text must
            occur. The files are copied first.
        folder: for a copy of the library, whose host code has then asked for nothing yet.
    """

    def __init__(
        self,
        arch: str,
        name: str,
        units: tuple[str, ...] | None = None,
        replace: tuple[tuple[str, str, str], ...] = (),
        folder: Path | None = None,
    ) -> None:
        self.arch, self.name = arch, name
        self.params = PARAMS.get(name, AttentionParams)
        self.virtual = "compute_90a" if arch == "sm90" else "compute_80"
        self.capability = 90 if arch == "sm90" else 80
        phase = CSRC / "cuda" / arch / name
        sources = {s.stem: s.relative_to(phase) for s in sorted(phase.rglob("*.cu"))}
        self.units = {x: path for x, path in sources.items() if units is None or x in units}
        assert units is None or set(units) == set(self.units), (units, sources)
        self._replace = replace
        self._modules: dict[str, object] = {}
        library, ptx = self._build()
        if folder is not None:
            library = Path(shutil.copy(library, folder))
        self._library = self._load(library, ptx)

    def _build(self) -> tuple[Path, dict[str, Path]]:
        """The library, and the PTX of each unit."""
        root = source_tree(self._below_csrc(*change) for change in self._replace)
        folder = root / "cuda" / self.arch / self.name
        with ThreadPoolExecutor(2) as pool:
            built = pool.map(lambda x: kernel_unit(folder / x, self.virtual), self.units.values())
            units = dict(zip(self.units, built, strict=True))
        include = f"-I{toolkit().include}"
        entry = host_unit(
            HERE / "phase_entry.cpp", "-std=c++17", "-fPIC", include,
            f'-DGQA_LAUNCH_HEADER="{folder / "launch.h"}"', f"-DGQA_ARCH={self.arch}",
            f"-DGQA_PHASE={self.name}", f"-DGQA_PARAMS={self.params.__name__}",
            reads=[folder / "launch.h"],
        )  # fmt: skip
        runtime = host_unit(HERE / "fake_cuda.cpp", "-std=c++17", "-O1", "-fPIC", include)
        library = link("phase.so", [entry, runtime, *(unit.object for unit in units.values())])
        return library, {stem: unit.ptx for stem, unit in units.items()}

    def _below_csrc(self, name: str, old: str, new: str) -> Replacement:
        """A replacement in the nearest file of that name."""
        cuda = CSRC / "cuda"
        own = [cuda / self.arch / self.name, cuda / self.arch, cuda / "common"]
        path = next(place / name for place in own if (place / name).exists())
        return Replacement(path.relative_to(CSRC).as_posix(), old, new)

    def _load(self, path: Path, ptx: dict[str, Path]) -> ctypes.CDLL:
        library = ctypes.CDLL(str(path), mode=os.RTLD_LAZY)
        library.gqa_sizeof_params.restype = ctypes.c_size_t
        library.gqa_workspace_bytes.restype = ctypes.c_size_t
        assert library.gqa_sizeof_params() == ctypes.sizeof(self.params)
        for stem, listing in ptx.items():
            module = ptxsim.Module(listing.read_text(), stem)
            self._modules |= dict.fromkeys(module.kernels(), module)
        return library

    def unsupported(self, call: Call) -> str:
        """The phase's reason why it can't run the call, or an empty string."""
        reason = ctypes.create_string_buffer(2000)
        self._library.gqa_unsupported(ctypes.byref(call.params), reason, len(reason))
        return reason.value.decode()

    def run(
        self, call: Call, num_sms: int = 4, procs: int = 1, fail: tuple[str, int] | None = None,
        **options,
    ) -> Result:  # fmt: skip
        """Run the call; its outputs are updated.

        Args:
            num_sms: that the host code sees.
            fail: ``(kind, error)``: calls of the runtime of that kind fail with that number.
            procs, options: of the emulator's ``launch`` (``seed``, ``check``, ...).

        Raises:
            RuntimeError: the host code threw. An error of the emulator is raised as it is.
        """
        assert not self.unsupported(call), self.unsupported(call)
        result = Result(call.out, call.lse)
        size = self._library.gqa_workspace_bytes(ctypes.byref(call.params), num_sms)
        workspace = torch.full((max(size, 1) + 256,), 255, dtype=torch.uint8)
        workspace = workspace[-workspace.data_ptr() % 256 :][:size]
        memory = Memory([*call.tensors.values(), workspace])
        errors: list[BaseException] = []

        def execute(event: FakeEvent) -> int:
            if fail is not None and event.kind.decode() == fail[0]:
                return fail[1]
            if event.kind != b"launch":
                return 0
            try:
                name = event.name.decode()
                module = self._modules[name]
                report = module.launch(
                    name, tuple(event.grid), tuple(event.block),
                    memory.arguments(module.code(name).entry.params, event.arguments),
                    smem_bytes=event.shared_bytes, cluster=tuple(event.cluster), procs=procs,
                    timeout=400, **options,
                )  # fmt: skip
                assert not report.warnings, report.warnings
                result.reports.append(report)
                result.launches.append((report.kernel, tuple(event.grid), event.shared_bytes))
            except BaseException as error:
                errors.append(error)
                return LAUNCH_FAILURE
            return 0

        hook = HOOK(lambda event: execute(event.contents))
        error = ctypes.create_string_buffer(2000)
        self._library.gqa_set_hook(hook)
        self._library.gqa_set_device(0, self.capability, num_sms, 227 * 1024)
        failed = self._library.gqa_run(
            ctypes.byref(call.params), POINTER(workspace.data_ptr()), num_sms, error, len(error)
        )
        if errors:
            raise errors[0]
        if failed:
            raise RuntimeError(error.value.decode())
        return result


class Memory:
    """CPU tensors as the emulator's device memory: addresses found in arguments become arrays."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._spans: dict[int, np.ndarray] = {}
        for x in tensors:
            storage = x.untyped_storage()
            if storage.nbytes():
                self.add(storage.data_ptr(), storage.nbytes())

    def add(self, address: int, size: int) -> None:
        """Bytes from an address on, which must stay valid."""
        raw = (ctypes.c_uint8 * size).from_address(address)
        self._spans[address] = np.ctypeslib.as_array(raw)

    def at(self, address: int) -> np.ndarray | None:
        """The bytes from ``address`` to the end of its tensor's memory."""
        for start, raw in self._spans.items():
            if start <= address < start + raw.size:
                return raw[address - start :]
        return None

    def arguments(self, params, arguments) -> list:
        """A launch's arguments as ``Struct``, with arrays in place of addresses."""
        return [
            ptxsim.Struct(raw, self._pointers(raw))
            for param, address in zip(params, arguments[: len(params)], strict=True)
            for raw in [ctypes.string_at(address, param.size)]
        ]

    def _pointers(self, raw: bytes) -> dict[int, object]:
        found, offset = {}, 0
        while offset + 8 <= len(raw):
            if raw[offset : offset + 8] == MAP_MAGIC:
                found[offset] = self._tensor_map(raw[offset : offset + 128])
                offset += 128
                continue
            array = self.at(struct.unpack_from("<Q", raw, offset)[0])
            if array is not None:
                found[offset] = array
            offset += 8
        return found

    def _tensor_map(self, raw: bytes):
        """The emulator's tensor map for a ``RecordedMap``."""
        _, rank, swizzle, nan_fill = struct.unpack_from("<4i", raw, 8)
        address, *sizes = struct.unpack_from("<10Q", raw, 24)
        dims, strides = sizes[:rank], sizes[5 : 5 + rank - 1]
        box = [extent + 1 for extent in raw[104 : 104 + rank]]
        elements = self.at(address)
        return ptxsim.TensorMap(
            elements[: elements.size // 2 * 2].view(np.uint16),
            tuple(reversed(box)),
            swizzle=SWIZZLES[swizzle],
            oob_fill="nan" if nan_fill else "zero",
            shape=tuple(reversed(dims)),
            strides=(*reversed(strides), 2),
        )


def emulate(phase: Phase, inputs: AttentionCall, num_sms: int = 4, **options) -> Result:
    """Run a call as the API would; ``options`` are of :meth:`Phase.run`."""
    return phase.run(make_call(inputs), num_sms, **options)


def check(inputs: AttentionCall, result: Result) -> None:
    """Hold the outputs of a call to the package's tolerance rule."""
    exact_out, exact_lse = reference_attention(upcast(inputs))
    forms = list(equivalent_forms(inputs))
    eager = [reference_attention(form, inputs.dtype, base2)[0] for form, base2 in forms]
    assert_close("out", result.out, exact_out, eager)
    eager = [reference_attention(form, None, base2)[1] for form, base2 in forms]
    assert_close("lse", result.lse, exact_lse, eager)


@lru_cache
def compiled(arch: str, name: str, *units: str) -> Phase:
    """A phase that tests share."""
    return Phase(arch, name, units or None)
