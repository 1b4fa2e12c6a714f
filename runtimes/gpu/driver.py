"""This machine's NVIDIA driver and GPUs, queried from the driver's library: no package is needed."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from dataclasses import dataclass

from vae_export.contract.targets import FlavourName
from vae_export.errors import BackendError
from vae_export.runtimes.compatibility import Machine
from vae_export.runtimes.gpu import flavours

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR (cuda.h)


@dataclass(frozen=True)
class Gpu:
    """A CUDA device.

    Attributes:
        name: as the driver calls it.
        capability: its compute capability, such as `9.0`.
        memory: in bytes.
    """

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver.

    Attributes:
        cuda: the newest version of CUDA that it runs, such as `13.0`; None without a driver.
        gpus: its devices, in CUDA's order.
        problem: the reason why there are none; None if there are some.
    """

    cuda: str | None
    gpus: tuple[Gpu, ...]
    problem: str | None


@functools.cache
def query() -> Driver:
    """The driver and its GPUs; queried once in a process."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(name)
    except OSError:
        return Driver(None, (), f"no NVIDIA driver: {name} cannot be loaded")
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    text = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if code := cuda.cuInit(0):
        return Driver(text, (), f"the NVIDIA driver finds no usable GPU: cuInit gave error {code}")
    cuda.cuDeviceGetCount(ctypes.byref(count))
    gpus = tuple(_gpu(cuda, index) for index in range(count.value))
    return Driver(text, gpus, None if gpus else "the NVIDIA driver finds no GPU")


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}", memory.value)


def this_platform() -> str:
    """Operating system and processor, such as `linux x86_64`."""
    return f"{platform.system()} {platform.machine()}".lower()


def this_machine(*names: FlavourName) -> Machine:
    """This machine's first GPU, and the versions of these flavours of TensorRT."""
    versions: dict[str, str | BackendError] = {}
    for name in names:
        try:
            versions[name] = flavours.load(name).version
        except BackendError as error:
            versions[name] = error
    known = query()
    gpu = known.gpus[0] if known.gpus else None
    return Machine(
        platform=this_platform(),
        flavours=versions,
        capability=gpu.capability if gpu else None,
        gpu=gpu.name if gpu else known.problem or "",
    )
