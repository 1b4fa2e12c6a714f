"""What is installed, what can be loaded, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Mapping
from typing import Any

from vae_export import __version__

#: Our extras that a person installs by name, and what each is for.
EXTRAS: Mapping[str, str] = {
    "cpu": "run bundles on the CPU",
    "gpu": "run bundles on CUDA",
    "export": "make bundles",
    "train": "train models",
    "openvino": "not used yet: builds for OpenVINO",
    "rtx": "not used yet: builds for TensorRT for RTX",
}
_UNUSED = {"openvino", "rtx"}
_CLASH = {"cpu": "onnxruntime-gpu", "gpu": "onnxruntime"}  # each excludes the other's package


def examine() -> dict[str, Any]:
    """Look around.

    Returns:
        Plain values: `python`, `platform`, `cores`, `extras` (for each what it is for, the packages with
        their versions or null, and the command that installs what is missing), `onnxruntime` (version and
        providers, or the reason that it cannot be loaded) and `problems`, in words.
    """
    extras = {}
    for extra, purpose in EXTRAS.items():
        packages = {name: _version(name) for name in _packages(extra)}
        missing = any(version is None for version in packages.values())
        extras[extra] = {
            "purpose": purpose,
            "packages": packages,
            "install": _install(extra) if missing and extra not in _UNUSED else None,
        }
    problems = []
    if _version("vae-export") is None:
        problems.append("vae-export itself is not installed, so that its extras are not known. Run: pip install .")
    installed = [name for name in _CLASH.values() if _version(name)]
    if len(installed) > 1:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files. Run: "
            "pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'vae-export[gpu]' (or [cpu])"
        )
    runtime = _onnxruntime()
    if "problem" in runtime:
        problems.append(runtime["problem"])
    return {
        "vae-export": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "onnxruntime": runtime,
        "extras": extras,
        "problems": problems,
    }


def _install(extra: str) -> str:
    other = _CLASH.get(extra)
    first = f"pip uninstall -y {other}; " if other and _version(other) else ""
    return f"{first}pip install 'vae-export[{extra}]'"


def _packages(extra: str) -> list[str]:
    try:
        requirements = importlib.metadata.requires("vae-export") or []
    except importlib.metadata.PackageNotFoundError:  # a bare checkout knows no extras
        return []
    mark = re.compile(rf"extra\s*==\s*['\"]{extra}['\"]")
    names = (re.match(r"[\w.-]+", line) for line in requirements if mark.search(line))
    return sorted(name.group() for name in names if name)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _onnxruntime() -> dict[str, Any]:
    if importlib.util.find_spec("onnxruntime") is None:
        return {
            "problem": "no runtime is installed, so that no bundle can be run. "
            "Run: pip install 'vae-export[cpu]' (or [gpu])"
        }
    try:
        import onnxruntime
    except Exception as error:  # a broken installation may raise anything; telling it is what doctor is for
        return {"problem": f"onnxruntime is installed and does not load: {error}"}
    return {"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}
