"""Engines of TensorRT for RTX, really built on this machine, which needs no GPU for that."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cuda.bindings.driver as cuda_driver
import cuda.core
import onnx
import pytest
import zoo
from onnx import TensorProto, helper
from torch import Tensor, nn

import vae_export
from vae_export.building import tensorrt
from vae_export.building.evaluation import Evaluator
from vae_export.contract import build_record, targets
from vae_export.contract.build_record import BuildFolder, Options
from vae_export.contract.model import Data, Latent, Likelihood, Model, Posterior
from vae_export.contract.targets import Profile
from vae_export.errors import BackendError, InputError
from vae_export.runtimes.gpu import driver, flavours
from vae_export.sources.protocol import Trained

RTX = flavours.load("tensorrt-rtx")
CAPABILITIES = ("sm86", "sm120")
#: Every model of the trainer, and what else an engine may meet: spatial latents, sizes that differ, no variance.
TRAINER = {
    "linear": {"model": "linear", "likelihood": "gaussian_fixed", "widths": ()},
    "mlp": {"model": "mlp", "likelihood": "bernoulli", "widths": (32,)},
    "conv": {"model": "conv", "likelihood": "gaussian", "shape": (3, 8, 12), "widths": (8, 16)},
    "resnet": {
        "model": "resnet",
        "likelihood": "discretized_logistic",
        "shape": (1, 8, 8),
        "widths": (8, 16),
        "blocks": 1,
    },
}
OTHERS = ("spatial", "spatial-named", "plain")
FEW = [Profile(batch=(1, 1, 1)), Profile(batch=(2, 8, 8))]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, member: Callable[[str], Any]) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    found = {name: member(name).bundle for name in OTHERS}
    for name, options in TRAINER.items():
        found[name] = folder / f"{name}.bundle"
        vae_export.export(zoo.trainer_model(**options), found[name])
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", [*TRAINER, *OTHERS])
def test_every_graph_is_built(
    bundles: Mapping[str, Path], tmp_path: Path, name: str, capability: str, precision: Any
) -> None:
    """All graphs × two capabilities × three precisions, with two profiles in each engine."""
    number = {"sm86": "8.6", "sm120": "12.0"}[capability]
    if any(gpu.capability == number for gpu in driver.query().gpus):
        pytest.skip("this machine would measure it, too: see test_gpu.py")
    target = f"tensorrt-rtx-{capability}"
    built = vae_export.build(bundles[name], target, precision=precision, batches=(1, 8), out=tmp_path / "b")
    record = built.record
    picture = len(zoo_shape(bundles[name])) == 3
    assert set(record.graphs) == {"encoder", "decoder", "reconstruct"} | ({"generate"} if picture else set())
    assert record.engine == build_record.Engine(
        flavour="tensorrt-rtx",
        version=RTX.version,
        capabilities=(number,),
        platform=driver.this_platform(),
    )
    assert [profile.batch for profile in record.options.profiles] == [(1, 1, 1), (2, 8, 8)]
    assert built.certificate is None
    assert built.unmeasured
    for content in BuildFolder(built.path).graphs().values():
        # The engine's own header, which no document describes: a magic number, and the version that reads it.
        assert content[:4] == b"vtrt"
        assert bytes(map(int, RTX.version.split("."))) in content[:32]


def zoo_shape(bundle: Path) -> tuple[Any, ...]:
    return vae_export.Bundle(bundle).manifest.model.data.shape


def test_precision_is_in_the_engine(bundles: Mapping[str, Path], tmp_path: Path) -> None:
    """Weights are stored in the precision that was asked for: half as large."""
    sizes = {}
    for precision in ("fp32", "fp16"):
        made = vae_export.build(
            wide(tmp_path), "tensorrt-rtx-sm89", precision=precision, batches=(1,), out=tmp_path / precision
        )
        sizes[precision] = made.record.files["decoder.engine"].size
    weights = 512 * 784 * 4
    assert sizes["fp32"] - sizes["fp16"] > 0.4 * weights


def wide(folder: Path) -> Path:
    path = folder / "wide.bundle"
    if not path.exists():
        vae_export.export(zoo.trainer_model("mlp", "bernoulli", shape=(1, 28, 28), latent=20, widths=(512,)), path)
    return path


def test_without_a_capability_all_that_rtx_knows(bundles: Mapping[str, Path], tmp_path: Path) -> None:
    built = vae_export.build(bundles["mlp"], "tensorrt-rtx", batches=(1,), out=tmp_path / "b")
    assert built.record.engine is not None
    known = built.record.engine.capabilities
    assert {"8.0", "8.6", "8.9", "12.0"} <= set(known)
    assert "7.5" not in known
    names = (f"SM{capability.replace('.', '')}" for capability in known)
    assert all(hasattr(RTX.trt.ComputeCapability, name) for name in names)
    with pytest.raises(InputError, match=r"builds for sm75, .*sm120.*; target is tensorrt-rtx-sm90"):
        vae_export.build(bundles["mlp"], "tensorrt-rtx-sm90", out=tmp_path / "hopper")
    assert not (tmp_path / "hopper").exists()


def test_sizes_and_static_shapes(bundles: Mapping[str, Path], tmp_path: Path) -> None:
    sizes = [{"height": 16, "width": 24}, {"height": 32, "width": 32}]
    built = vae_export.build(
        bundles["spatial-named"], "tensorrt-rtx-sm89", batches=(1, 4), sizes=sizes, out=tmp_path / "sizes"
    )
    assert list(map(str, built.record.options.profiles)) == [
        "batch 1 to 1, height 4 to 16, width 4 to 24",
        "batch 2 to 4, height 4 to 16, width 4 to 24",
        "batch 1 to 1, height 4 to 32, width 4 to 32",
        "batch 2 to 4, height 4 to 32, width 4 to 32",
    ]
    static = vae_export.build(
        bundles["spatial-named"], "tensorrt-rtx-sm89", batches=(4,), sizes=sizes[:1], static=True, out=tmp_path / "one"
    )
    assert list(map(str, static.record.options.profiles)) == ["batch 4 to 4, height 16 to 16, width 24 to 24"]
    with pytest.raises(InputError, match=r"this model takes height \(a multiple of 4\), width .*; got height = 15"):
        vae_export.build(bundles["spatial-named"], "tensorrt-rtx-sm89", sizes=[{"height": 15, "width": 24}])


class Transposed(nn.Module):
    """Transposed convolutions, as older decoders have them."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(128, 6))
        self.back = nn.Sequential(
            nn.Linear(3, 128), nn.Unflatten(1, (8, 4, 4)), nn.SiLU(), nn.ConvTranspose2d(8, 1, 4, 2, 1)
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.into(x).chunk(2, dim=1)
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        return self.back(z)


@pytest.fixture(scope="module")
def transposed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transposed") / "transposed.bundle"
    model = Model(
        architecture="transposed",
        parameters=1,
        data=Data(shape=(1, 8, 8), range=(0.0, 1.0)),
        latent=Latent(shape=(3,)),
        prior="standard_normal",
        posterior=Posterior(kind="diagonal_gaussian"),
        likelihood=Likelihood(kind="gaussian_fixed", variance=0.1),
    )
    module = zoo.fill(Transposed())
    vae_export.export(Trained(module, model, zoo.ORIGIN, zoo.CONFIG, (1, 8, 8)), path)
    return path


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_transposed_convolutions(transposed: Path, tmp_path: Path, capability: str, precision: Any) -> None:
    built = vae_export.build(transposed, f"tensorrt-rtx-{capability}", precision=precision, out=tmp_path / "b")
    assert built.record.options.precision == precision


def test_what_rtx_cannot_build_is_said(transposed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        r"build: TensorRT for RTX \S+ does not build the decoder in bf16\. Transposed convolutions in bf16 are one "
        r"thing that it cannot build: use --precision fp16 or fp32, .* It says: .*"
    )
    monkeypatch.setattr(Evaluator, "problem", lambda self, graph, reduced, share=1.0: None)  # as if it passed
    with pytest.raises(BackendError, match=message):
        vae_export.build(transposed, "tensorrt-rtx-sm86", precision="bf16", out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_turing_has_no_float32_products(bundles: Mapping[str, Path], tmp_path: Path) -> None:
    vae_export.build(bundles["mlp"], "tensorrt-rtx-sm75", precision="fp16", batches=(1,), out=tmp_path / "b")
    with pytest.raises(BackendError, match=r"in fp32\. Turing has no float32 .* use --precision fp16\. .*FP32 GEMM"):
        vae_export.build(bundles["mlp"], "tensorrt-rtx-sm75", batches=(1,), out=tmp_path / "c")


@pytest.mark.skipif(not driver.query().problem, reason="this machine has a GPU")
def test_refittable_engines_need_a_gpu(bundles: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="A refittable engine needs a GPU where it is built: build there"):
        vae_export.build(bundles["mlp"], "tensorrt-rtx-sm86", refittable=True, out=tmp_path / "b")


def test_the_parsers_errors_name_the_node(member: Callable[[str], Any]) -> None:
    """An operator that it does not know, and one with inputs that it refuses."""
    model = member("plain").source.model
    z, sample = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("z", 3), ("sample", 12))
    )
    for operator, attributes in (("StringNormalizer", {}), ("Unheard", {})):
        node = helper.make_node(operator, ["z"], ["sample"], name="the node", **attributes)
        graph = onnx.helper.make_model(helper.make_graph([node], "g", [z], [sample])).SerializeToString()
        steps = tensorrt.build(
            RTX, {"decoder": graph}, model, targets.parse("tensorrt-rtx-sm86"), Options(profiles=tuple(FEW))
        )
        with pytest.raises(BackendError) as error:
            next(steps)
        expected = rf"cannot parse the decoder: .*node 0 'the node' \({operator}\)"
        assert re.search(expected, str(error.value)), error.value


def test_a_failure_says_its_own_reason_only(
    transposed: Path, tmp_path: Path, bundles: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was complained of before does not show up in a later message."""
    monkeypatch.setattr(Evaluator, "problem", lambda self, graph, reduced, share=1.0: None)  # as if it passed
    with pytest.raises(BackendError):
        vae_export.build(transposed, "tensorrt-rtx-sm86", precision="bf16", out=tmp_path / "a")
    vae_export.build(bundles["mlp"], "tensorrt-rtx-sm86", batches=(1,), out=tmp_path / "b")
    assert RTX.errors() == "it gave no reason"


#: What the code uses of the API that only runs on a GPU, so that no test here calls it.
USED = {
    "Runtime": ["deserialize_cuda_engine"],
    "ICudaEngine": [
        *("create_runtime_config", "create_execution_context", "device_memory_size_v2", "num_io_tensors"),
        *("get_tensor_name", "get_tensor_mode", "get_tensor_dtype", "get_tensor_shape"),
        *("create_serialization_config", "serialize_with_config"),
    ],
    "IRuntimeConfig": ["set_execution_context_allocation_strategy"],
    "IExecutionContext": [
        *("set_optimization_profile_async", "set_device_memory", "set_input_shape", "set_tensor_address"),
        *("infer_shapes", "execute_async_v3"),
    ],
    "Refitter": ["refit_cuda_engine"],
    "OnnxParserRefitter": ["refit_from_bytes", "num_errors", "get_error"],
    "ISerializationConfig": ["set_flag"],
    "SerializationFlag": ["INCLUDE_REFIT"],
    "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
    "DataType": ["FLOAT", "UINT8"],
}
#: RTX alone has these, TensorRT alone those.
RTX_ONLY = {
    "IRuntimeConfig": ["create_runtime_cache", "set_runtime_cache", "dynamic_shapes_kernel_specialization_strategy"],
    "IRuntimeCache": ["serialize", "deserialize"],
    "IExecutionContext": ["is_stream_capturable"],
    "DynamicShapesKernelSpecializationStrategy": ["EAGER"],
}
TENSORRT_ONLY = {
    "IBuilderConfig": ["create_timing_cache", "set_timing_cache", "get_timing_cache"],
    "ITimingCache": ["serialize"],
}


@pytest.mark.parametrize("used", [USED, RTX_ONLY, TENSORRT_ONLY])
def test_rtx_has_what_is_used(used: Mapping[str, list[str]]) -> None:
    missing = [
        f"{kind}.{name}" for kind, names in used.items() for name in names if not hasattr(getattr(RTX.trt, kind), name)
    ]
    assert not missing


def test_tensorrt_11_has_what_is_used() -> None:
    """Its bindings install without its libraries, so that they cannot be imported: the names are in the file."""
    found = importlib.util.find_spec("tensorrt_bindings")
    assert found is not None
    assert found.origin is not None
    raw = (Path(found.origin).parent / "tensorrt.so").read_bytes()
    names = {name for used in (USED, TENSORRT_ONLY) for kind, names in used.items() for name in (kind, *names)}
    names |= {"STRONGLY_TYPED", "build_serialized_network", "OnnxParser", "REFIT", "TF32", "node_operator", "node_name"}
    assert not [name for name in sorted(names) if not re.search(rb"\b" + name.encode() + rb"\b", raw)]


def test_cuda_has_what_is_used() -> None:
    expected = {
        cuda.core: ["Device", "DeviceMemoryResource", "DeviceMemoryResourceOptions", "LEGACY_DEFAULT_STREAM", "launch",
                    "LaunchConfig", "LegacyPinnedMemoryResource", "PER_THREAD_DEFAULT_STREAM", "Program",
                    "ProgramOptions", "Stream"],
        cuda.core.Device: ["set_current", "create_stream"],
        cuda.core.Stream: ["record", "wait", "sync", "handle", "create_graph_builder", "from_handle", "close"],
        cuda.core.Buffer: ["handle", "size", "close", "set_deallocation_stream"],
        cuda.core.DeviceMemoryResource: ["allocate", "close", "handle"],
        cuda.core.Event: ["sync", "is_done"],
        cuda.core.graph.GraphBuilder: ["begin_building", "end_building", "complete"],
        cuda.core.graph.Graph: ["launch", "upload"],
        cuda.core.utils: ["StridedMemoryView", "FileStreamProgramCache"],
        cuda.core.utils.StridedMemoryView: ["from_any_interface", "from_buffer", "ptr", "device_id", "strides"],
        cuda_driver: ["cuMemcpyAsync", "cuMemcpyDtoH", "cuMemPoolSetAttribute", "cuuint64_t"],
        cuda_driver.CUmemPool_attribute: ["CU_MEMPOOL_ATTR_RELEASE_THRESHOLD"],
    }  # fmt: skip
    assert not [f"{owner}.{name}" for owner, names in expected.items() for name in names if not hasattr(owner, name)]


@pytest.mark.skipif(not driver.query().problem, reason="this machine has a GPU")
def test_without_a_gpu_engines_are_refused_in_words(bundles: Mapping[str, Path], tmp_path: Path) -> None:
    built = vae_export.build(bundles["mlp"], "tensorrt-rtx-sm89", batches=(1,), out=tmp_path / "b")
    message = r"b: built for compute capability 8\.9; this machine has no GPU \(no NVIDIA driver.*Run: vae-export build"
    with pytest.raises(BackendError, match=message):
        vae_export.load(bundles["mlp"], build=built.path)
    # Past the check, TensorRT itself would refuse.
    runtime = RTX.trt.Runtime(RTX.logger)
    assert runtime.deserialize_cuda_engine(BuildFolder(built.path).graphs()["decoder"]) is None
    assert "CUDA" in RTX.errors()


def test_profiles_reach_the_engine(member: Callable[[str], Any]) -> None:
    """A profile that a graph's shapes contradict is refused by the builder itself."""
    model = member("plain").source.model
    graph = member("plain").bundle / "vae_decoder" / "model.onnx"
    proto = onnx.load(graph)
    proto.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    steps = tensorrt.build(
        RTX,
        {"decoder": proto.SerializeToString()},
        model,
        targets.parse("tensorrt-rtx-sm86"),
        Options(profiles=(Profile(batch=(1, 1, 1)),)),
    )
    with pytest.raises(BackendError, match=r"does not build the decoder in fp32.*It says: "):
        next(steps)
