"""From a trained PyTorch model to a verified bundle."""

from __future__ import annotations

import contextlib
import copy
import datetime
import importlib.metadata
import logging
import math
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir
import safetensors.numpy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vae_export import bundle, certificate, elbo, golden, images, model_card, noise, onnx_reader, verifier
from vae_export import manifest as manifests
from vae_export.certificate import Certificate
from vae_export.errors import InputError
from vae_export.golden import EXTREMES, Reference
from vae_export.manifest import DECODER_OUTPUTS, ENCODER_OUTPUTS, Golden, Graph, Manifest, Model, SizeDim
from vae_export.manifest import Tensor as TensorRecord
from vae_export.runtimes import VAE, open_backend
from vae_export.sources import checkpoint
from vae_export.sources.protocol import Decoder, Encoder, Source
from vae_export.trainers.objective import log_prob_of

#: The newest version of the ONNX operators that PyTorch's exporter writes by default; every backend that
#: is built for has kernels for it.
OPSET = 20
_SEED = 2014
_ROWS = 256  # of held-out data, and of prior draws
_CALIBRATION_ROWS = 512
_CALIBRATION_LIMIT = 16 << 20
_INLINE_LIMIT = 1_900_000_000  # protobuf ends at 2 GiB
_TRACE_BATCH = 3  # not 1, which tracing would take for a constant
_TOOLS = ("vae-export", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")


def export(
    source: str | os.PathLike[str] | Source,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Certificate:
    """Export a trained model, and prove that the export computes the same.

    The bundle appears at `path` whole, and only if every check of its certificate holds.

    Args:
        source: a checkpoint folder of our trainer, or a `Source`.
        path: the bundle's folder.
        overwrite: replace a bundle that is there.
        progress: called with the name of each step as it begins.

    Returns:
        The certificate, which the bundle holds as `verification.json`.

    Raises:
        InputError: the source cannot be read or exported, or something is at `path`.
        BundleError: the graph is no pure function (random operators, loops, custom operators).
        BackendError: ONNX Runtime is not installed.
        VerificationError: the exported graphs differ from the model by more than their budgets.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"export: {path} exists already. Choose another path, or overwrite it (--force)")
    if not isinstance(source, Source):
        source = checkpoint.load(Path(source))
    _check_size(source)
    name = re.sub(r"\.bundle$", "", path.resolve().name)
    model = source.model

    graphs, records = {}, {}
    latent = model.latent_shape(_sizes(source))
    for kind, wrapper, takes, shape, gives in (
        ("encoder", Encoder, "x", source.example_shape, ENCODER_OUTPUTS[model.posterior.kind]),
        ("decoder", Decoder, "z", latent, DECODER_OUTPUTS[model.likelihood.kind]),
    ):
        progress(f"tracing the {kind}")
        module = wrapper(source.module, model).eval()
        graphs[kind], records[kind] = _trace(kind, module, takes, shape, gives, model)
        onnx_reader.check_operators(graphs[kind], kind)

    progress("computing the reference in float64")
    reference = compute_reference(source)
    progress("measuring the certificate")
    backend = open_backend(graphs, records, device="cpu")
    measured = verifier.measure(model, backend, reference, name)
    measured.require()

    progress("writing the bundle")
    kept = reference.shrunk()
    rows = golden.encode(kept)
    golden.decode(rows, kept.record, model)
    vae = VAE(model, backend)
    with bundle.create(path, overwrite=overwrite) as folder:
        for kind, graph in graphs.items():
            file = folder / records[kind].file
            file.parent.mkdir()
            file.write_bytes(graph)
        (folder / "config.json").write_bytes(source.config)
        (folder / golden.FILE).write_bytes(rows)
        (folder / golden.CALIBRATION_FILE).write_bytes(_calibration(source))
        (folder / "verification.json").write_bytes(certificate.encode(measured))
        picture = images.is_picture(model.data.shape)
        if picture:
            examples = vae.sample(64, size=_sizes(source))
            images.grid(examples, model.data.range, columns=16).save(folder / model_card.PICTURE)
        card = model_card.write(name, model, source.origin, measured, picture=picture)
        (folder / model_card.FILE).write_text(card, encoding="utf-8")
        manifest = Manifest(
            format=manifests.FORMAT,
            version=manifests.VERSION,
            digest="",
            name=name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            model=model,
            graphs=records,
            golden=kept.record,
            origin=source.origin,
            tools=_tools(),
            files=bundle.list_files(folder),
        )
        bundle.write_manifest(folder, manifest)
    return measured


def compute_reference(source: Source) -> Reference:
    """Run the PyTorch model in float64 on held-out data, extremes and prior draws; see `golden`.

    The ELBO's terms are those of `trainers.objective`: PyTorch's, not the runtime's NumPy ones.
    """
    model, seed = source.model, _SEED
    exact, single = _Torch(source, torch.float64), _Torch(source, torch.float32)
    latent = model.latent_shape(_sizes(source))
    size = math.prod(latent)
    z = noise.normals(seed, noise.PRIOR, 0, _ROWS, size).reshape(-1, *latent)
    prior = exact.decode(z)
    held_out = np.zeros((0, *source.example_shape), np.float32)
    if source.held_out is not None:
        rows = noise.permutation(seed, noise.VERIFIER, 0, len(source.held_out))[:_ROWS]
        held_out = np.asarray(source.held_out[np.sort(rows)], np.float32)
    decoded = np.clip(prior["sample"], *model.data.range).astype(np.float32)[: _ROWS - len(held_out)]
    x = np.concatenate([golden.extremes(source.example_shape, model.data.range), held_out, decoded])

    posterior = exact.encode(x)
    _check_claims(model, posterior, prior)
    eps = noise.normals(seed, noise.POSTERIOR, 0, len(x), size).reshape(-1, *latent)
    tensors: golden.Tensors = {"x": x, **posterior, **exact.terms(x, eps)}
    tensors |= {f"prior.{name}": value for name, value in prior.items()}
    own = single.encode(x) | {f"prior.{name}": value for name, value in single.decode(z).items()}
    if "logvar" in posterior:
        divergence = elbo.kl_between_terms(posterior["mean"], posterior["logvar"], own["mean"], own["logvar"])
        tensors["float32.divergence"] = divergence.reshape(len(x), -1).max(axis=1)
    if "scale" in tensors:
        terms = single.terms(x, eps)
        tensors |= {f"float32.{name}": terms[name] for name in ("reconstruction", "kl")}
    for name, value in own.items():
        tensors[f"float32.{name}"] = np.abs(value - tensors[name]).reshape(len(value), -1).max(axis=1)
    precision = "float64"
    if exact.lower:
        precision = f"float64, of which it computes some in {', '.join(sorted(exact.lower))} all the same"
    record = Golden(
        seed=seed,
        reference=f"PyTorch {torch.__version__} {precision}",
        extremes=EXTREMES,
        held_out=len(held_out),
        decoded=len(decoded),
        prior=_ROWS,
    )
    return Reference(record, tensors)


class _Torch:
    """The PyTorch model at one precision, on NumPy arrays, in slices."""

    BATCH = 64

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        module = copy.deepcopy(source.module).to(dtype).eval()
        self.model = source.model
        self.dtype = dtype
        self.encoder, self.decoder = Encoder(module, source.model), Decoder(module, source.model)
        self.likelihood = None
        if source.model.likelihood.kind != "none":
            self.likelihood = log_prob_of(source.model.likelihood, source.model.data)
        #: Precisions below its own that the model computed in.
        self.lower: set[str] = set()

    def encode(self, x: npt.NDArray[np.float32]) -> golden.Tensors:
        return self._run(lambda part: self._named("encode", self.encoder, part), x)

    def decode(self, z: npt.NDArray[np.float32]) -> golden.Tensors:
        return self._run(lambda part: self._named("decode", self.decoder, part), z)

    def terms(self, x: npt.NDArray[np.float32], eps: npt.NDArray[np.float32]) -> golden.Tensors:
        """The decoded mean at the drawn latent, and the ELBO's terms where the model has them."""
        return self._run(self._terms, x, eps)

    def _terms(self, x: Tensor, eps: Tensor) -> dict[str, Tensor]:
        posterior = self.encoder(x)
        if len(posterior) == 1:
            return {"sample": self.decoder(posterior[0])[0]}
        mean, logvar = posterior
        parameters = self.decoder(mean + torch.exp(0.5 * logvar) * eps)
        result = {"sample": parameters[0]}
        if self.likelihood:
            # Whatever the model's precision, the terms are formed and summed in float64: what remains is
            # the model's own error.
            x, mean, logvar = x.double(), mean.double(), logvar.double()
            terms = self.likelihood(x, tuple(p.double() for p in parameters)).flatten(1)
            kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1)
            scale = terms.abs().sum(1) + kl.abs().sum(1)
            result |= {"reconstruction": terms.sum(1), "kl": kl.sum(1), "scale": scale}
        return result

    def _named(self, method: str, wrapper: Encoder | Decoder, value: Tensor) -> dict[str, Tensor]:
        """The outputs by name, their shapes checked, and the precisions watched in which they are computed."""
        with _Watch() as watch:
            outputs = dict(zip(wrapper.outputs, wrapper(value), strict=True))
        self.lower |= {name for name in watch.seen if self.dtype == torch.float64}
        into = tuple(value.shape[1:])
        sized = zip(self.model.data.shape, into, strict=True) if method == "encode" else ()
        named = {dim.name: size for dim, size in sized if isinstance(dim, SizeDim)}
        expected = self.model.latent_shape(named) if method == "encode" else self.model.data_shape(into)
        for name, output in outputs.items():
            if tuple(output.shape) != (len(value), *expected):
                raise InputError(
                    f"export: {method} gave {name} of shape {tuple(output.shape)} for a batch of {len(value)}; "
                    f"expected {(len(value), *expected)}"
                )
        return outputs

    def _run(self, function: Callable[..., dict[str, Tensor]], *arrays: npt.NDArray[np.float32]) -> golden.Tensors:
        parts = []
        with torch.no_grad():
            for first in range(0, len(arrays[0]), self.BATCH):
                inputs = [torch.from_numpy(a[first : first + self.BATCH]).to(self.dtype) for a in arrays]
                parts.append(function(*inputs))
        return {name: torch.cat([part[name] for part in parts]).double().numpy() for name in parts[0]}


class _Watch(TorchDispatchMode):
    """Notes floating-point results that are not float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
                self.seen.add(str(value.dtype).removeprefix("torch."))
        return result


def _check_claims(model: Model, posterior: golden.Tensors, prior: golden.Tensors) -> None:
    """Refuse a source that says of its model what its outputs contradict."""
    for name, value in (*posterior.items(), *prior.items()):
        if not np.isfinite(value).all():
            raise InputError(f"export: the model's {name} has values that are not finite, in float64 in PyTorch")
    clamps = (
        ("logvar", posterior.get("logvar"), model.posterior.logvar_clamp),
        ("sample_logvar", prior.get("sample_logvar"), model.likelihood.logvar_clamp),
    )
    for name, values, clamp in clamps:
        if values is not None and clamp and not (clamp[0] <= values.min() and values.max() <= clamp[1]):
            raise InputError(
                f"export: {name} is said to be clamped to {list(clamp)}, and the model gives values from "
                f"{values.min():g} to {values.max():g}"
            )
    if model.likelihood.kind == "bernoulli":
        error = np.abs(prior["sample"] - 1.0 / (1.0 + np.exp(-prior["logits"]))).max()
        if error > 1e-6:
            raise InputError(
                f"export: decode must return (sample, logits) with sample = sigmoid(logits); they differ by {error:.3g}"
            )


def _trace(
    kind: str, module: nn.Module, takes: str, shape: tuple[int, ...], gives: tuple[str, ...], model: Model
) -> tuple[bytes, Graph]:
    """One graph as ONNX bytes, with dynamic batch and named dimensions, and its record."""
    data = tuple(d.name if isinstance(d, SizeDim) else d for d in model.data.shape)
    latent = tuple(d if isinstance(d, int) else str(d) for d in model.latent.shape)
    into, out = (data, latent) if kind == "encoder" else (latent, data)
    example = torch.zeros(_TRACE_BATCH, *shape)
    names = {0: "batch"} | {i + 1: re.sub(r"\W", "_", d) for i, d in enumerate(into) if isinstance(d, str)}
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                input_names=[takes],
                output_names=list(gives),
                dynamic_shapes=(names,),
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
            if isinstance(cause, InputError):
                raise cause from None
        raise InputError(
            f"export: PyTorch could not trace the {kind} as one graph that is the same for every input. "
            "Control flow that depends on values is the usual reason. PyTorch says: "
            f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
        ) from error
    assert program is not None
    graph = program.model
    _rename_inner(graph)
    for value, dims in [*((v, into) for v in graph.graph.inputs), *((v, out) for v in graph.graph.outputs)]:
        value.shape = onnx_ir.Shape(["batch", *dims])
    _forget_origin(graph)
    raw = onnx_ir.to_proto(graph).SerializeToString()
    if len(raw) > _INLINE_LIMIT:
        raise InputError(f"export: the {kind} has {len(raw):,} bytes; up to {_INLINE_LIMIT:,} are supported so far")
    record = Graph(
        file=f"vae_{kind}/model.onnx",
        opset=graph.opset_imports[""],
        inputs=(TensorRecord(name=takes, dtype="float32", shape=("batch", *into)),),
        outputs=tuple(TensorRecord(name=n, dtype="float32", shape=("batch", *out)) for n in gives),
    )
    return raw, record


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what PyTorch's exporter says about itself: its own deprecations, and missing torchvision."""
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


def _rename_inner(model: onnx_ir.Model) -> None:
    """Keep the names of inputs and outputs for them: PyTorch may call an inner value `mean`, too."""
    ends = [*model.graph.inputs, *model.graph.outputs]
    names = {value.name for value in ends}
    inner = [value for node in model.graph.all_nodes() for value in node.outputs]
    for index, value in enumerate([*inner, *model.graph.initializers.values()]):
        if value.name in names and not any(value is end for end in ends):
            value.name = f"{value.name}_inner_{index}"


def _forget_origin(model: onnx_ir.Model) -> None:
    """Drop the stack traces and paths of the exporting machine that PyTorch writes beside every node."""
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


def _sizes(source: Source) -> dict[str, int]:
    dims = zip(source.model.data.shape, source.example_shape, strict=True)
    return {dim.name: size for dim, size in dims if isinstance(dim, SizeDim)}


def _check_size(source: Source) -> None:
    shape = source.model.data.shape
    fits = len(shape) == len(source.example_shape) and all(
        dim.allows(size) if isinstance(dim, SizeDim) else dim == size
        for dim, size in zip(shape, source.example_shape, strict=True)
    )
    if not fits:
        raise InputError(f"export: example_shape {source.example_shape} does not fit the data's shape {shape}")
    for name in ("held_out", "calibration"):
        rows = getattr(source, name)
        if rows is not None and (len(rows) == 0 or rows.shape[1:] != source.example_shape):
            raise InputError(
                f"export: {name} has shape {rows.shape}; expected one row or more of {source.example_shape}"
            )


def _calibration(source: Source) -> bytes:
    """Examples to choose a lower precision by: training data where there is any, else none."""
    if source.calibration is None:
        return safetensors.numpy.save({"x": np.zeros((0, *source.example_shape), np.float32)})
    rows = source.calibration
    limit = max(1, min(_CALIBRATION_ROWS, _CALIBRATION_LIMIT // rows[0].nbytes))
    chosen = noise.permutation(_SEED, noise.VERIFIER, 1, len(rows))[:limit]
    return safetensors.numpy.save({"x": np.ascontiguousarray(rows[np.sort(chosen)], np.float32)})


def _tools() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _TOOLS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
