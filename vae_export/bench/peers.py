"""Other ways to run the model: PyTorch, eager and compiled, diffusers, and OpenVINO's own conversion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vae_export.bench.cells import VERBS, Cell, Results
from vae_export.bench.runners import Call, Function, Graphs, Recipe, Runner
from vae_export.contract.bundle import Bundle
from vae_export.errors import BackendError, require
from vae_export.runtimes.cpu.openvino import compiled

if TYPE_CHECKING:
    from vae_export.sources.protocol import Trained


class Eager(Runner):
    """The PyTorch model in eager and evaluation mode without gradients: tensors in, tensors out."""

    name = "PyTorch eager"
    addressed, peer, precision = False, True, "fp32"
    verbs = frozenset(VERBS)
    recipe: Recipe | None = None

    def __init__(self, trained: Trained, *, threads: int | None = None) -> None:
        """Prepare the module of a source.

        Args:
            trained: the source.
            threads: of PyTorch in this process until `close`; None leaves them.
        """
        torch = require("torch", "export", "bench --source")
        self._before = torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        self.module = trained.module.eval()
        self._trained = trained

    def functions(self) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        """Encode and decode for one more shape."""
        return self.module.encode, self.module.decode  # type: ignore[return-value]

    def prepare(self, cell: Cell) -> Call:
        """Noise is from `torch.randn`; the ELBO is the trainer's objective."""
        import torch

        from vae_export.trainers import objective

        encode, decode = self.functions()
        value, latent = torch.from_numpy(cell.value), (cell.batch, *cell.latent)

        model = self._trained.model
        pair: Any = SimpleNamespace(encode=lambda x: tuple_of(encode(x)), decode=lambda z: tuple_of(decode(z)))
        calls: dict[str, Call] = {
            "encode": lambda: encode(value),
            "decode": lambda: decode(value),
            "sample": lambda: decode(torch.randn(latent)),
            "reconstruct": lambda: decode(first(encode(value))),
        }
        if cell.verb == "elbo":
            log_prob = objective.log_prob_of(model.likelihood, model.data)
            calls["elbo"] = lambda: objective.elbo(pair, log_prob, value, torch.randn(latent))
        call = calls[cell.verb]

        def without_gradients() -> Any:
            with torch.inference_mode():
                return call()

        return without_gradients

    def results(self, verb: str, result: Any) -> Results:
        if verb == "elbo":
            return {"kl": result.kl.numpy(), "reconstruction": result.reconstruction.numpy()}
        return {"mean" if verb == "encode" else "sample": first(result).numpy()}

    def close(self) -> None:
        """Give PyTorch its threads back."""
        import torch

        torch.set_num_threads(self._before)


class Compiled(Eager):
    """`torch.compile` in its default mode, for one shape at a time. The first call compiles."""

    name = "torch.compile"

    def functions(self) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        """Compile again: PyTorch keeps a few shapes of a function, and silently runs further ones in eager mode."""
        import torch

        torch._dynamo.reset()
        encode, decode = super().functions()
        return torch.compile(encode, dynamic=False), torch.compile(decode, dynamic=False)


class Diffusers(Eager):
    """The autoencoder's class in diffusers, called as its documentation does, with its output objects."""

    name = "diffusers"
    verbs = frozenset({"encode", "decode", "sample", "reconstruct"})  # it has no likelihood

    def functions(self) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        """The methods of the diffusers class."""
        vae: Any = self.module.vae
        return vae.encode, vae.decode


class OpenVino(Graphs):
    """The bundle's graphs through OpenVINO's own conversion, for exactly the batch that is run.

    Results lie in the request's memory until its next call: nothing is copied.
    """

    def __init__(self, bundle: str | Path, *, precision: str = "fp32", threads: int | None = None) -> None:
        """Read the graphs.

        Args:
            bundle: its folder.
            precision: `fp32` or `bf16`, passed to OpenVINO as a hint.
            threads: of one call; None leaves the number to OpenVINO.

        Raises:
            InputError, BundleError: as for `load`.
            BackendError: OpenVINO is not installed, has no such precision here, or cannot be given the graphs.
        """
        openvino = require("openvino", "openvino", "bench --peers")
        opened = Bundle(bundle)
        super().__init__(opened.manifest.model)
        hint = {"fp32": "f32"}.get(precision, precision)
        self.name, self.precision = f"OpenVINO {hint}", precision
        self.recipe = Recipe(f"openvino-{precision}", str(bundle), threads)
        self._openvino, self._core = openvino, openvino.Core()
        capabilities = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if {"f32": "FP32"}.get(hint, hint.upper()) not in capabilities:
            raise BackendError(
                f"bench --peers: OpenVINO has no {precision} on this processor, only {', '.join(capabilities)}. "
                "Nothing to install would change it"
            )
        self._graphs, weights = opened.graphs()
        if weights:
            raise BackendError(
                f"bench --peers: the weights of {opened.path} lie beside its graphs, and OpenVINO reads a graph from "
                "memory only with its weights inside. It is not timed"
            )
        self._settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads

    def function(self, graph: str, shape: tuple[int, ...], outputs: Sequence[str]) -> Function:
        """Read the graph, fix its shape and compile it."""
        model = self._core.read_model(self._graphs[graph])
        model.reshape(self._openvino.PartialShape(list(shape)))
        executable = compiled(self._core, model, self._settings)
        request = executable.create_infer_request()
        wanted = [executable.output(name) for name in outputs]

        def run(value: Any) -> Sequence[Any]:
            results = request.infer([value], share_inputs=True, share_outputs=True)
            return [results[output] for output in wanted]

        return run


def tuple_of(given: Any) -> tuple[Any, ...]:
    """The output of a model as a tuple, also where it is a single tensor."""
    import torch

    return (given,) if isinstance(given, torch.Tensor) else tuple(given)


def first(given: Any) -> Any:
    """The (decoded) mean in a model's output, which is a tensor, a tuple, or an output object of diffusers."""
    import torch

    output = given if isinstance(given, torch.Tensor) else given[0]
    return output if isinstance(output, torch.Tensor) else output.mean
