"""From a PyTorch module to an ONNX graph that computes the same at every batch and every named size."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator

import onnx_ir
import torch
from torch import nn

from vae_export.contract.manifest import Graph
from vae_export.contract.model import Model
from vae_export.exporting import sizes
from vae_export.graph import exact_norm, write
from vae_export.graph.weights import apart

#: The newest version of the ONNX operators that PyTorch's exporter writes by default; every backend has kernels for it.
OPSET = 20
#: File name of weights beside a graph, as in Optimum's layout.
WEIGHTS = "model.onnx_data"
_ARITHMETIC = ("Add", "Sub", "Mul", "Div")
_NEAR_ZERO, _NEAR_ONE = 2e-8, 2e-5  # twice the tolerances of the optimizer's rules


def trace(kind: str, module: nn.Module, shape: tuple[int, ...], model: Model) -> tuple[bytes, bytes | None, Graph]:
    """One graph as ONNX, with dynamic batch and named dimensions.

    Args:
        kind: `encoder` or `decoder`.
        module: maps one input to a tuple of outputs, in evaluation mode, in float32 on the CPU.
        shape: of one example of the input, at which it is traced.
        model: has the names and shapes of inputs and outputs.

    Returns:
        The graph's bytes; the bytes of the weights beside it, or None where the graph holds them; and its record.

    Raises:
        InputError: PyTorch cannot trace the module, or only for some of the batches and sizes that the model takes.
    """
    inputs, outputs = model.signature(kind)
    named = {axis: dim for axis, dim in enumerate(inputs[0].shape) if isinstance(dim, str)}
    axes = {axis: re.sub(r"\W", "_", name) for axis, name in named.items()}
    example = torch.zeros(sizes.TRACE_BATCH, *shape)
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                input_names=[tensor.name for tensor in inputs],
                output_names=[tensor.name for tensor in outputs],
                dynamic_shapes=(axes,),
                opset_version=OPSET,
                verbose=False,
                optimize=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise sizes.trace_error(kind, error, named, example.shape, model) from error
    assert program is not None
    sizes.check_every_size(kind, program.exported_program, named, example.shape, model)
    _keep_small_constants(program.model)
    program.optimize()
    graph = program.model
    for value, tensor in zip((*graph.graph.inputs, *graph.graph.outputs), (*inputs, *outputs), strict=True):
        value.name = tensor.name  # the optimizer renames outputs that share a value
        value.shape = onnx_ir.Shape(tensor.shape)
    _rename_inner(graph)
    exact_norm.apply(graph)
    _strip_metadata(graph)
    data = apart(graph, WEIGHTS)
    record = Graph(
        file=f"vae_{kind}/model.onnx",
        opset=graph.opset_imports[""],
        inputs=inputs,
        outputs=outputs,
        weights=None if data is None else f"vae_{kind}/{WEIGHTS}",
    )
    return write(graph), data, record


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's messages about its own deprecations and about missing torchvision."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(level)


def _keep_small_constants(model: onnx_ir.Model) -> None:
    """Hide from the optimizer scalars that it would replace by 0 or 1: an epsilon of 1e-15, a factor of 1.000005.

    Its rules for adding 0 and multiplying by 1 match scalars to 1e-8 and 1e-5 (onnxscript 0.7, `rewriter`), and only
    scalars: with one axis the constants broadcast alike and stay.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type not in _ARITHMETIC:
            continue
        for index, value in enumerate(node.inputs):
            other = node.inputs[1 - index]
            tensor = None if value is None else onnx_ir.convenience.get_const_tensor(value)
            if tensor is None or other is None or other.shape is None or not len(other.shape) or tensor.numpy().ndim:
                continue
            array = tensor.numpy()
            number = float(array) if array.dtype.kind == "f" else 0.0
            if 0 < abs(number) < _NEAR_ZERO or 0 < abs(number - 1) < _NEAR_ONE:
                constant = onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(array.reshape(1))})
                assert node.graph is not None
                node.graph.insert_before(node, constant)
                node.replace_input_with(index, constant.outputs[0])


def _rename_inner(model: onnx_ir.Model) -> None:
    """Rename inner values that have the name of an input or output: PyTorch may name one `mean`, too."""
    signature = [*model.graph.inputs, *model.graph.outputs]
    names = {value.name for value in signature}
    inner = [value for node in model.graph.all_nodes() for value in node.outputs]
    for index, value in enumerate([*inner, *model.graph.initializers.values()]):
        if value.name in names and not any(value is other for other in signature):
            value.name = f"{value.name}_inner_{index}"


def _strip_metadata(model: onnx_ir.Model) -> None:
    """Remove the stack traces and paths of the exporting machine that PyTorch writes beside every node."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
