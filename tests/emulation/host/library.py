"""The compiled host code of the CUDA ops on CPU tensors, every call that it makes recorded.

csrc/host and the launch code under csrc/cuda are compiled as they are, and linked with a fake CUDA
runtime (``fake_cuda.cpp``) and a shim of torch that makes CPU tensors seem to lie on a CUDA device
(``fake_torch.cpp``). The ops are in the namespace ``gqa_host``, once per process.

    host = Host()
    with host.recording(H100) as record:
        out, lse = host.forward(inputs)         # an AttentionCall
    record.launches[0].grid
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import cpp_extension

from gqa_kernels.call.append import AppendCall
from gqa_kernels.call.attention import AttentionCall
from gqa_kernels.call.keep import KeepCall
from gqa_kernels.native import cuda_build, schema
from gqa_kernels.native.sources import COMPILE_FLAGS
from tools import ptxsim

from ..compiled_units import (
    KernelUnit,
    Replacement,
    host_unit,
    kernel_unit,
    link,
    source_tree,
    toolkit,
)
from ..cuda_harness import Memory
from ..fake_runtime import HOOK, LAUNCH_FAILURE, FakeEvent

HERE = Path(__file__).resolve().parent
ENTRY = re.compile(r"\.entry (\w+)\(\s*\.param \.align \d+ \.b8 \w+\[(\d+)\]")
OPS = {
    "attention_forward": schema.FORWARD,
    "attention_output": schema.OUTPUT,
    "attention_backward": schema.BACKWARD,
    "cache_append": schema.APPEND,
    "cache_keep": schema.KEEP,
}
NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice


class Device(NamedTuple):
    """Facts of a device. The product asks once per index: an index has the same facts always."""

    index: int
    capability: int
    num_sms: int
    shared_limit: int  # bytes that a thread block may have

    @property
    def stream(self) -> int:
        """Handle of the stream that torch says is current there."""
        return 0x5000 + self.index

    @property
    def other_stream(self) -> int:
        return 0x6000 + self.index


A100 = Device(0, 80, 108, 163 * 1024)
H100 = Device(1, 90, 132, 227 * 1024)
B200 = Device(2, 100, 148, 227 * 1024)
RTX_5090 = Device(3, 120, 170, 99 * 1024)
SECOND_H100 = Device(4, 90, 114, 227 * 1024)
DEVICES = (A100, H100, B200, RTX_5090, SECOND_H100)


@dataclass
class Event:
    """A call of the fake runtime: ``GqaEvent``, the arguments of a launch as bytes."""

    kind: str
    name: str
    device: int
    stream: int
    captured: bool
    address: int
    bytes: int
    value: int
    grid: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    cluster: tuple[int, ...] = ()
    shared_bytes: int = 0
    arguments: bytes = b""


@dataclass
class Record:
    """What happened, in order."""

    events: list[Event] = field(default_factory=list)

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    @property
    def launches(self) -> list[Event]:
        return self.of("launch")

    def live(self, event: Event) -> dict[int, int]:
        """Bytes of what host code has allocated and not freed when an event happens, by address."""
        memory: dict[int, int] = {}
        tensors: Counter[int] = Counter()  # a tensor and its views hold the same memory
        for before in self.events[: self.events.index(event)]:
            if before.kind == "allocate":
                memory[before.address] = before.bytes
                tensors[before.address] += 1
            elif before.kind == "free":
                tensors[before.address] -= 1
        return {address: size for address, size in memory.items() if tensors[address] > 0}


class Host:
    """The library; ``replace`` changes its sources first."""

    def __init__(self, replace: tuple[Replacement, ...] = ()) -> None:
        root = source_tree(replace)
        kernels = {
            path: "compute_90a" if "sm90" in path.parts else "compute_80"
            for path in cuda_build.kernel_sources(root, ("80", "90a"))
        }
        with ThreadPoolExecutor(2) as pool:
            units = list(pool.map(kernel_unit, kernels, kernels.values()))
        self._find_kernels(units)
        self._streams = _load_streams()
        self._library = ctypes.CDLL(str(_link(root, units)), mode=os.RTLD_LAZY)
        self._hook = None
        fragment = torch.library.Library("gqa_host", "FRAGMENT")
        for name, arguments in OPS.items():
            fragment.define(name + arguments.text)
        self._fragment = fragment  # its ops live as long as it does

    def _find_kernels(self, units: list[KernelUnit]) -> None:
        self._units: dict[str, KernelUnit] = {}
        self._sizes: dict[str, int] = {}
        self._architectures: dict[str, str] = {}
        self._modules: dict[Path, ptxsim.Module] = {}
        for unit in units:
            text = unit.ptx.read_text()
            architecture = re.search(r"^\.target (\w+)", text, re.M)[1]
            for name, size in ENTRY.findall(text):
                self._units[name] = unit
                self._sizes[name] = int(size)
                self._architectures[name] = architecture

    @property
    def current_device(self) -> int:
        return self._library.gqa_current_device()

    @contextlib.contextmanager
    def recording(
        self, device: Device, *, current: Device | None = None, capture: bool = False,
        fail: tuple[str, int, int] | None = None, memory: list[Tensor] | None = None,
        elsewhere: tuple[Tensor, ...] = (),
    ) -> Iterator[Record]:  # fmt: skip
        """Record what calls do whose tensors lie on a device.

        Args:
            device: of every tensor that is not ``elsewhere``, which is on the A100.
            current: the device that is current at first; default: the same.
            capture: torch's stream is being captured into a graph.
            fail: ``(kind, n, error)``: the n-th event of a kind fails with that number.
            memory: have the emulator execute launches that are not captured, with these tensors as
                the device's memory and whatever host code allocates.
        """
        library, record = self._library, Record()
        library.gqa_reset()
        for each in DEVICES:
            library.gqa_set_device(*each)
            for stream in (each.stream, each.other_stream):
                library.gqa_add_stream(each.index, ctypes.c_void_p(stream))
            self._streams.gqa_set_stream(each.index, ctypes.c_void_p(each.stream))
        library.gqa_set_current_device((current or device).index)
        library.gqa_place_others(device.index)
        for x in elsewhere:
            library.gqa_place(ctypes.c_void_p(x.data_ptr()), A100.index)
        if capture:
            library.gqa_capture(ctypes.c_void_p(device.stream), 1)
        errors: list[BaseException] = []

        def handle(pointer) -> int:
            try:
                event = self._event(pointer.contents)
                seen = len(record.of(event.kind))
                record.events.append(event)
                if fail is not None and fail[:2] == (event.kind, seen):
                    return fail[2]
                return self._launch(event, record, memory) if event.kind == "launch" else 0
            except BaseException as error:  # ctypes would print it and go on
                errors.append(error)
                return LAUNCH_FAILURE

        self._hook = HOOK(handle)
        library.gqa_set_hook(self._hook)
        try:
            yield record
        except RuntimeError:
            if errors:
                raise errors[0] from None
            raise
        finally:
            library.gqa_set_hook(HOOK())
        if errors:
            raise errors[0]

    def _event(self, event: FakeEvent) -> Event:
        found = Event(
            event.kind.decode(), event.name.decode(), event.device, event.stream or 0,
            bool(event.captured), event.address or 0, event.bytes, event.value,
        )  # fmt: skip
        if found.kind == "launch":
            found.grid, found.block = tuple(event.grid), tuple(event.block)
            found.cluster, found.shared_bytes = tuple(event.cluster), event.shared_bytes
            found.arguments = ctypes.string_at(event.arguments[0], self._sizes[found.name])
        return found

    def _launch(self, event: Event, record: Record, memory: list[Tensor] | None) -> int:
        capability = next(d.capability for d in DEVICES if d.index == event.device)
        if self._architectures[event.name] == "sm_90a" and capability != 90:
            return NO_KERNEL_IMAGE
        if memory is not None and not event.captured:
            self.execute(event, memory, record.live(event))
        return 0

    def execute(self, event: Event, memory: list[Tensor], live: dict[int, int]) -> None:
        """Have the emulator execute a recorded launch."""
        ptx = self._units[event.name].ptx
        if ptx not in self._modules:
            self._modules[ptx] = ptxsim.Module(ptx.read_text(), ptx.parent.name)
        module = self._modules[ptx]
        spans = Memory(memory)
        for address, size in live.items():
            spans.add(address, size)
        argument = ctypes.create_string_buffer(event.arguments, len(event.arguments))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        params = module.code(event.name).entry.params
        report = module.launch(
            event.name, event.grid, event.block, spans.arguments(params, pointers),
            smem_bytes=event.shared_bytes, cluster=event.cluster, procs=1, timeout=400,
        )  # fmt: skip
        assert not report.warnings, report.warnings

    def forward(self, inputs: AttentionCall) -> tuple[Tensor, Tensor]:
        """The op of a call."""
        arguments = schema.FORWARD.arguments_of(inputs)
        return torch.ops.gqa_host.attention_forward(*arguments)

    def output(self, inputs: AttentionCall) -> Tensor:
        """The op that keeps no LSE."""
        return torch.ops.gqa_host.attention_output(*schema.OUTPUT.arguments_of(inputs))

    def backward(self, **arguments: object) -> tuple[Tensor, ...]:
        """The op, with arguments by the names of its schema."""
        return torch.ops.gqa_host.attention_backward(*schema.BACKWARD.Arguments(**arguments))

    def append(self, inputs: AppendCall) -> Tensor:
        """The op of an append."""
        return torch.ops.gqa_host.cache_append(*schema.APPEND.arguments_of(inputs))

    def keep(self, inputs: KeepCall) -> None:
        """The op of a keep."""
        torch.ops.gqa_host.cache_keep(*schema.KEEP.arguments_of(inputs))


def unavailable_reason() -> str | None:
    """Why this can't be tested here beyond a missing compiler, or None."""
    if torch.version.cuda is not None:
        return "this torch has a libtorch_cuda of its own, which no stand-in can replace"
    return None


def _load_streams() -> ctypes.CDLL:
    """The stand-in for libtorch_cuda, loaded as Python loads torch's: with local scope."""
    unit = host_unit(HERE / "fake_stream.cpp", "-std=c++17", "-fPIC")
    path = link("libtorch_cuda.so", [unit], "-Wl,-soname,libtorch_cuda.so")
    return ctypes.CDLL(str(path), mode=os.RTLD_LOCAL)


def _link(root: Path, units: list[KernelUnit]) -> Path:
    torch_lib = Path(torch.__file__).parent / "lib"
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths("cpu")]
    flags = [flag for flag in COMPILE_FLAGS if flag != "-O3" and "Py_LIMITED_API" not in flag]
    flags += [*includes, f"-isystem{toolkit().include}", "-DGQA_CUDA_SM90"]
    sources = [*cuda_build.host_sources(root), *cuda_build.shared_checks(root)]
    sources = [path for path in sources if path.name != "bindings_cuda.cpp"]
    objects = [host_unit(path, *flags) for path in sources]
    fakes = [HERE / "fake_torch.cpp", HERE.parent / "fake_cuda.cpp"]
    objects += [host_unit(path, *flags, "-fvisibility=default") for path in fakes]
    return link(
        "host.so", [*objects, *(unit.object for unit in units)], "-Wl,-Bsymbolic", "-Wl,-z,defs",
        f"-L{torch_lib}", "-ltorch_cpu", "-ldl", f"-Wl,-rpath,{torch_lib}",
    )  # fmt: skip
