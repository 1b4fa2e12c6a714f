"""Errors of runners, rewritten: which graph failed, at which sizes, in which node, why, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vae_export.errors import BackendError, BundleError, VaeExportError

# ONNX Runtime: "… while running Split node. Name:'x' Status Message: /src/file.h:84 Class::function(…) condition was
# false. Why". OpenVINO: lines of locations, "[CPU] Split node with name 'x' Check '…' failed at …:", and why.
_NODES = (
    re.compile(r"while running (?P<operator>\S+) node\. Name:'(?P<name>[^']*)' Status Message: (?P<why>.*)", re.DOTALL),
    re.compile(r"\[CPU\] (?P<operator>\S+) node with name '(?P<name>[^']*)'(?P<why>.*)", re.DOTALL),
)
_SOURCE = re.compile(r"^\S+\.(?:cc|cpp|h|hpp):\d+ (?:.* was false\. ?|[^)]*\) )?")
_LOCATION = re.compile(r" failed at \S+:\d+:$|^Exception from ")
_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
#: Messages of runners that are out of memory, with the bytes that they tried to allocate.
_NO_MEMORY = re.compile(
    r"allocate memory(?: for requested buffer of size (?P<ort>\d+))?|bad_alloc|out of memory"
    r"|allocate (?P<openvino>\d+) bytes|Unable to allocate",
    re.IGNORECASE,
)


def failure(graph: str, runner: str, n: int, sizes: Mapping[str, int], error: Exception) -> VaeExportError:
    """The error to raise for one of a runner, in a call of n examples whose data have these sizes.

    A BundleError if it names a node of the graph, else a BackendError.
    """
    text = str(error).strip()
    at = ", ".join([f"a batch of {n}", *(f"{name} {size}" for name, size in sizes.items())])
    lack = _NO_MEMORY.search(text)
    if lack or isinstance(error, MemoryError):
        size = lack and (lack["ort"] or lack["openvino"])
        more = f": {runner} asked for {int(size):,} bytes more" if size else ""
        return BackendError(
            f"not enough memory for the {graph} at {at}{more}. Give fewer or smaller examples, or load with a smaller "
            "micro_batch or with max_memory"
        )
    kind = BundleError if _node(text) else BackendError
    return kind(
        f"the {graph} fails at {at}, which the model is said to take. {runner} says: {words(error)}. Take another "
        "batch or size, or export the model again without what was made for one size"
    )


def words(error: Exception) -> str:
    """A runner's message in one line: the node, if it names one, and the reason, without locations in its source."""
    text = str(error).strip()
    node = _node(text)
    lines = (node["why"] if node else text).strip().splitlines() or [type(error).__name__]
    first = _SOURCE.sub("", _CODE.sub("", lines[0]))
    why = lines[-1] if _LOCATION.search(first) else first
    why = why.removeprefix("[cpu]").strip().rstrip(".")
    return f"{node['operator']} node {node['name']!r}: {why}" if node else why


def _node(text: str) -> re.Match[str] | None:
    return next(filter(None, (known.search(text) for known in _NODES)), None)
