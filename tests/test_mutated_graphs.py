"""Graphs changed at random, in bundles with a right manifest: an error or a result, never the end of the process."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from vae_export.contract import onnx_guard
from vae_export.errors import BundleError
from vae_export.runtimes.ort_session import session_options

#: Of the graph of many operators, in which more can be wrong; and of an exported one.
_MUTANTS, _OF_EXPORTED = 750, 150
_NUMBERS = (-(1 << 63), -(1 << 31), -2, -1, 0, 1, 2, 3, 5, 64, 1 << 20, (1 << 31) - 1, 1 << 32, (1 << 63) - 1)


def number_of_an_attribute(graph: onnx.GraphProto, choose: random.Random) -> None:
    attribute = choose.choice([a for node in graph.node for a in node.attribute if a.type in (a.INT, a.INTS)])
    if attribute.type == attribute.INT:
        attribute.i = choose.choice(_NUMBERS)
    elif attribute.ints:
        attribute.ints[choose.randrange(len(attribute.ints))] = choose.choice(_NUMBERS)


def length_of_an_attribute(graph: onnx.GraphProto, choose: random.Random) -> None:
    attribute = choose.choice([a for node in graph.node for a in node.attribute if a.type in (a.INT, a.INTS)])
    if attribute.ints and choose.random() < 0.5:
        attribute.ints.pop()
    else:
        attribute.ints.append(choose.choice(_NUMBERS))


def small_constant(graph: onnx.GraphProto, choose: random.Random) -> None:
    tensor = choose.choice([t for t in graph.initializer if np.prod(t.dims) <= 8])
    array = numpy_helper.to_array(tensor).copy()
    if array.size:
        kind = array.dtype.type
        value = float(choose.choice(_NUMBERS)) if array.dtype.kind == "f" else choose.choice(_NUMBERS)
        array.flat[choose.randrange(array.size)] = kind(value)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def sizes_of_a_weight(graph: onnx.GraphProto, choose: random.Random) -> None:
    tensor = choose.choice(graph.initializer)
    array = numpy_helper.to_array(tensor)
    changes: list[Callable[[], npt.NDArray[Any]]] = [
        lambda: array.reshape(-1), lambda: array[None], lambda: array[..., None], lambda: array.T,
        lambda: array[:1], lambda: array[:0], lambda: np.concatenate([array, array]),
    ]  # fmt: skip
    if array.ndim:
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(choose.choice(changes)()), tensor.name))


def ends_of_a_node(graph: onnx.GraphProto, choose: random.Random) -> None:
    node = choose.choice(graph.node)
    ends = choose.choice([node.input, node.input, node.output])
    names = [tensor.name for tensor in graph.initializer] + [name for n in graph.node for name in n.output]
    change = choose.randrange(4)
    if change == 0 and ends:
        ends.pop()
    elif change == 1:
        ends.append(choose.choice(["", *names]))
    elif ends:
        ends[choose.randrange(len(ends))] = "" if change == 2 else choose.choice(names)


def operator_of_a_node(graph: onnx.GraphProto, choose: random.Random) -> None:
    others = [*{node.op_type for node in graph.node}, "Split", "LayerNormalization", "DFT", "Resize", "ConstantOfShape"]
    choose.choice(graph.node).op_type = choose.choice(sorted(others))


MUTATIONS = (
    number_of_an_attribute, length_of_an_attribute, small_constant, sizes_of_a_weight, ends_of_a_node,
    operator_of_a_node,
)  # fmt: skip


def everything() -> bytes:
    """A graph with operators whose kernels do not check their inputs."""
    given: dict[str, npt.NDArray[Any]] = {
        "k": np.ones((4, 1, 3, 3), np.float32), "w": np.ones(8, np.float32), "b": np.ones(8, np.float32),
        "s": np.array([2, 2], np.int64), "shape": np.array([0, -1], np.int64), "i": np.array([0, 1], np.int64),
        "scales": np.array([1, 1, 2, 2], np.float32), "n": np.array([24, 24], np.int64), "d": np.array([3], np.int64),
        "e": np.array([2, 3], np.int64), "z": np.array([0, 0], np.int64),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64), "tiles": np.array([1, 1, 1, 1], np.int64),
    }  # fmt: skip
    node = helper.make_node
    nodes = [
        node("Div", ["n", "d"], ["h"]),
        node("Slice", ["x", "z", "h", "e"], ["o"]),
        node("Conv", ["o", "k"], ["c"], group=2, pads=[1, 1, 1, 1], strides=[1, 1]),
        node("LayerNormalization", ["c", "w", "b"], ["l"], axis=-1),
        node("Split", ["l", "s"], ["p", "q"], axis=1),
        node("Concat", ["q", "p"], ["j"], axis=1),
        node("DepthToSpace", ["j"], ["u"], blocksize=2),
        node("SpaceToDepth", ["u"], ["v"], blocksize=2),
        node("Transpose", ["v"], ["t"], perm=[0, 1, 3, 2]),
        node("Resize", ["t", "", "scales"], ["r"], mode="nearest"),
        node("Pad", ["r", "pads"], ["a"]),
        node("MaxPool", ["a"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Gather", ["m", "i"], ["g"], axis=1),
        node("Tile", ["g", "tiles"], ["f"]),
        node("Reshape", ["f", "shape"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["b", 2, 8, 8])
    y = helper.make_empty_tensor_value_info("y")
    weights = [numpy_helper.from_array(array, name) for name, array in given.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def verdict(raw: bytes) -> str:
    """The verdict on a graph; a fatal one ends this process."""
    try:
        settings = session_options(onnxruntime, onnx_guard.check_operators(raw, "m"), 1)
    except BundleError:
        return "refused"
    try:
        session = onnxruntime.InferenceSession(raw, settings, providers=["CPUExecutionProvider"])
        (end,) = session.get_inputs()
        shape = [size if isinstance(size, int) else 2 for size in end.shape]
        session.run(None, {end.name: np.full(shape, 0.3, np.float32)})
    except Exception:
        return "failed"
    return "ran"


def main(path: str, count: str) -> None:
    """Print a verdict for each of some mutants of a graph."""
    raw = Path(path).read_bytes()
    for seed in range(int(count)):
        choose, mutant = random.Random(seed), onnx.ModelProto.FromString(raw)
        for mutate in choose.choices(MUTATIONS, k=choose.randrange(1, 4)):
            mutate(mutant.graph, choose)
        print(seed, end=" ", flush=True)
        print(verdict(mutant.SerializeToString()), flush=True)


def test_the_graph_runs() -> None:
    assert verdict(everything()) == "ran"


@pytest.mark.parametrize("part", ["everything", "vae_encoder", "vae_decoder"])
def test_no_mutant_ends_the_process(digits: dict[str, Path], tmp_path: Path, part: str) -> None:
    path, count = digits["bernoulli"] / part / "model.onnx", _OF_EXPORTED
    if part == "everything":
        path, count = tmp_path / "model.onnx", _MUTANTS
        path.write_bytes(everything())
    command = [sys.executable, __file__, str(path), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (lines[-1:], done.stderr[-500:])
    assert len(lines) == count
    # Each is there, so that the mutants are worth something.
    assert {line.split()[1] for line in lines} == {"refused", "failed", "ran"}


if __name__ == "__main__":
    main(*sys.argv[1:])
