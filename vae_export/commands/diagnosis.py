"""What `vae-export doctor` finds out: what is installed, what can be loaded, what is missing and how to get it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from vae_export import __version__, versions
from vae_export.contract import cache, targets
from vae_export.errors import BackendError, require
from vae_export.runtimes import processor
from vae_export.runtimes.gpu import driver, flavours
from vae_export.runtimes.gpu.device import compile_kernels

#: Our extras that a person installs by name, and what each is for.
EXTRAS: Mapping[str, str] = {
    "cpu": "run bundles on the CPU",
    "gpu": "run bundles on CUDA",
    "build": "make builds for ONNX Runtime",
    "tensorrt": "make and run builds for TensorRT",
    "rtx": "make and run builds for TensorRT for RTX",
    "export": "make bundles",
    "diffusers": "export autoencoders in the layout of diffusers",
    "train": "train models",
    "openvino": "time OpenVINO beside a bundle",
}
#: Where there is no GPU, a compute capability to try the kernels' compilation with.
_ANY_CAPABILITY = "9.0"
_CLASH = {"cpu": "onnxruntime-gpu", "gpu": "onnxruntime"}  # the package that each extra excludes


def examine() -> dict[str, Any]:
    """The state of this installation and machine as plain values.

    Returns:
        `vae-export`, `python`, `platform`, `cores`, `processor`, `extras` (for each its purpose, its packages with
        their versions or null, and the command that installs what is missing), `onnxruntime` (version and
        providers, or the reason that it cannot be loaded), `driver` (NVIDIA's: its CUDA version, and its GPUs or why
        there are none), `tensorrt` (for each flavour its version, or why it cannot be loaded), `kernels` (whether
        noise can be made on a GPU), `cache` (of builds: its path, or why it cannot be used), and `problems`, in words.
    """
    extras = {}
    for extra, purpose in EXTRAS.items():
        packages = {name: versions.of(name) for name in _packages(extra)}
        install = _install(extra) if None in packages.values() else None
        extras[extra] = {"purpose": purpose, "packages": packages, "install": install}
    problems = []
    if versions.of("vae-export") is None:
        problems.append("vae-export itself is not installed, so that its extras are not known. Run: pip install .")
    installed = [name for name in _CLASH.values() if versions.of(name)]
    if len(installed) > 1:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files. Run: "
            "pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'vae-export[gpu]' (or [cpu])"
        )
    runtime = _onnxruntime()
    if "problem" in runtime:
        problems.append(runtime["problem"])
    gpus, here = driver.query(), processor.processor()
    return {
        "vae-export": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "processor": f"{here}: {', '.join(here.features)}",
        "onnxruntime": runtime,
        "driver": {"cuda": gpus.cuda, "gpus": [dataclasses.asdict(gpu) for gpu in gpus.gpus], "problem": gpus.problem},
        "tensorrt": {targets.title(name): _attempt("version", partial(_version, name)) for name in flavours.EXTRAS},
        "kernels": _attempt("compiled_for", lambda: _kernels(gpus.gpus)),
        "cache": _attempt("path", lambda: str(cache.check_cache())),
        "extras": extras,
        "problems": problems,
    }


def _install(extra: str) -> str:
    other = _CLASH.get(extra)
    first = f"pip uninstall -y {other}; " if other and versions.of(other) else ""
    return f"{first}pip install 'vae-export[{extra}]'"


def _attempt(name: str, value: Callable[[], str]) -> dict[str, str]:
    """A value under its name, or the problem in the way."""
    try:
        return {name: value()}
    except (BackendError, OSError) as error:
        return {"problem": str(error)}


def _version(flavour: targets.FlavourName) -> str:
    return flavours.load(flavour).version


def _kernels(gpus: Sequence[driver.Gpu]) -> str:
    """The compute capability that the kernels compile for."""
    capability = gpus[0].capability if gpus else _ANY_CAPABILITY
    compile_kernels(require("cuda.core", "gpu", "noise on the GPU"), capability)
    return capability


def _packages(extra: str) -> list[str]:
    try:
        requirements = importlib.metadata.requires("vae-export") or []
    except importlib.metadata.PackageNotFoundError:  # a bare checkout knows no extras
        return []
    mark = re.compile(rf"extra\s*==\s*['\"]{extra}['\"]")
    names: set[str] = set()
    for line in filter(mark.search, requirements):
        name, inner = re.findall(r"^([\w.-]+)(?:\[(\w+)\])?", line)[0]
        names |= set(_packages(inner)) if name == "vae-export" else {name}
    return sorted(names)


def _onnxruntime() -> dict[str, Any]:
    if importlib.util.find_spec("onnxruntime") is None:
        return {
            "problem": "no runtime is installed, so that no bundle can be run. "
            "Run: pip install 'vae-export[cpu]' (or [gpu])"
        }
    try:
        import onnxruntime
    except Exception as error:  # a broken installation may raise anything, and doctor reports it
        return {"problem": f"onnxruntime is installed and does not load: {error}"}
    return {"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}
