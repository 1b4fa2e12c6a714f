"""The processor that this process runs on: its name, its instruction sets, and how many cores may be used.

NumPy's answer overrides the system's: under an emulator the system describes the machine below.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

from vae_export.contract.build_record import Processor
from vae_export.runtimes.threads import cores

#: The instruction sets that matter to graphs, by Linux' names. Records have no others.
_X86 = (
    *("avx", "f16c", "fma", "avx2", "avx_vnni", "avx_vnni_int8", "avx_ne_convert"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
)
_ARM = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme")
#: Linux' names by NumPy's. BMI2, GFNI and VAES are of no use to graphs: they reveal an emulator.
_SAME = ("AVX", "F16C", "AVX2", "AVX512F", "AVX512BW", "AVX512VL", "ASIMD", "ASIMDHP", "ASIMDDP", "SVE")
_AVX512 = {f"AVX512{name.upper()}": f"avx512_{name}" for name in ("vnni", "bf16", "fp16")}
_NUMPY = {name: name.lower() for name in (*_SAME, "BMI2", "GFNI", "VAES")} | {"FMA3": "fma"} | _AVX512
_APPLE: Mapping[str, str] = {"hw.optional.AdvSIMD": "asimd"} | {
    f"hw.optional.arm.FEAT_{feature}": name
    for feature, name in zip(
        ("FP16", "DotProd", "I8MM", "BF16", "SME"), ("asimdhp", "asimddp", "i8mm", "bf16", "sme"), strict=True
    )
}


def features() -> frozenset[str]:
    """The instruction sets of this processor, as far as they matter to graphs.

    Linux' names (`avx2`, `avx512_vnni`, `amx_bf16`, `asimddp`, …) and two for every architecture, which
    `ExecutionPlan.requires` uses:

    - `vnni`: products of 8-bit integers are summed in 32 bits at once (AVX512-VNNI, AVX-VNNI, ARM's dot product).
      Without it, x86 adds pairs of them in 16 bits first, which overflow.
    - `bf16`: products of bfloat16 (AVX512-BF16, AMX, AVX2 with NE-CONVERT and VNNI-INT8, ARM's BF16).

    Under an emulator Linux reports the host's processor: then only what NumPy detected by CPUID counts.
    """
    return _features()


def processor() -> Processor:
    """This processor, for the record of a build."""
    return Processor(
        model=_model(),
        architecture=_architecture(),
        features=tuple(sorted(features())),
        cores=cores(),
        threads=len(_allowed()),
    )


def general(known: frozenset[str]) -> frozenset[str]:
    """The names for every architecture, derived from a processor's own: see `features`."""
    names = set()
    if known & {"avx512_vnni", "avx_vnni", "asimddp"}:
        names.add("vnni")
    if known & {"avx512_bf16", "amx_bf16", "bf16"} or {"avx_ne_convert", "avx_vnni_int8"} <= known:
        names.add("bf16")
    return frozenset(names)


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@functools.cache
def _features() -> frozenset[str]:
    return combined(_reported(), _detected())


def combined(reported: frozenset[str], detected: Mapping[str, bool]) -> frozenset[str]:
    """The instruction sets that the system reports, unless detection contradicts it, and those that were detected."""
    has = {name for name, there in detected.items() if there}
    lacks = set(detected) - has
    known = frozenset((has | (frozenset() if reported & lacks else reported)) & {*_X86, *_ARM})
    return known | general(known)


def _detected() -> dict[str, bool]:
    """The instruction sets that NumPy looked for, by Linux' names, and whether the processor has them."""
    for module in ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath"):  # 1.26 has it in the second
        try:
            all_names: Mapping[str, bool] = getattr(importlib.import_module(module), "__cpu_features__", {})
        except ImportError:
            continue
        if all_names:
            # NumPy lists the names of all architectures: it did not look for those of others.
            ours = {*_ARM} if _architecture() == "aarch64" else {*_NUMPY.values()} - {*_ARM}
            return {_NUMPY[name]: there for name, there in all_names.items() if _NUMPY.get(name) in ours}
    return {}


def _reported() -> frozenset[str]:
    """The instruction sets that the system reports; empty where it reports none."""
    if sys.platform == "darwin":
        return frozenset(name for key, name in _APPLE.items() if _sysctl(key) == b"\1\0\0\0")
    facts = _cpuinfo()
    return frozenset((facts.get("flags") or facts.get("Features") or "").split())


def _model() -> str:
    if sys.platform == "darwin":
        name = (_sysctl("machdep.cpu.brand_string") or b"").rstrip(b"\0").decode(errors="replace")
    elif sys.platform == "win32":
        name = _registry()
    else:
        facts = _cpuinfo()
        name = facts.get("model name", "")
        if not name and "CPU part" in facts:
            name = f"ARM, implementer {facts.get('CPU implementer')}, part {facts['CPU part']}"
    return " ".join((name or platform.processor() or platform.machine() or "unknown").split())


def _architecture() -> str:
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine) or "unknown"


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of Linux' /proc/cpuinfo; empty on other systems."""
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _sysctl(key: str) -> bytes | None:
    """A value of macOS' kernel, as raw bytes."""
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    size = ctypes.c_size_t(256)
    value = ctypes.create_string_buffer(size.value)
    failed = library.sysctlbyname(key.encode(), value, ctypes.byref(size), None, ctypes.c_size_t(0))
    return None if failed else value.raw[: size.value]


def _registry() -> str:
    if sys.platform == "win32":
        import winreg

        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0") as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0])
    return ""
