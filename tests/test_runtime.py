"""The runtime: one parity body for every model and backend, and the laws that hold whatever the batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
import rounding
import torch
import zoo
from conftest import PLACES

import vae_export
from vae_export.contract.model import DECODER_OUTPUTS, Data
from vae_export.errors import BackendError, BundleError, InputError
from vae_export.numerics import elbo, noise
from vae_export.numerics.pixels import is_picture
from vae_export.runtimes import VAE, Settings
from vae_export.runtimes.backend import planned
from vae_export.runtimes.cpu.dispatch import CpuBackend
from vae_export.runtimes.inputs import ArrayCheck
from vae_export.trainers.objective import elbo as torch_elbo
from vae_export.trainers.objective import log_prob_of

#: Float32's ELBO against float64's, of S; see `certificate.TOLERANCES`.
RELATIVE = 5e-6

#: Two ways to split a batch: on a GPU each may run by another kernel.
SPLIT = {"cpu": 1e-6, "cpu build": 1e-6}


@pytest.fixture(params=sorted(zoo.MEMBERS))
def case(request: pytest.FixtureRequest, member: Callable[[str], Any]) -> Any:
    return member(request.param)


def examples(source: Any, count: int = 9) -> np.ndarray:
    low, high = source.model.data.range
    return (zoo.pictures(count, source.example_shape) * (high - low) + low).astype(np.float32)


@pytest.mark.parametrize("place", PLACES)
def test_parity(case: Any, place: str, placed: Callable[..., Any]) -> None:
    """Posterior, then decoded mean, then ELBO, against PyTorch in float64 with the same noise."""
    source = case.source
    model, module = source.model, zoo.MEMBERS[case.bundle.stem]().module.double()
    x = examples(source)
    with vae_export.load(case.bundle, **placed(case.bundle, place)) as vae, torch.no_grad():
        posterior = vae.encode(x)
        encoded = module.encode(torch.from_numpy(x).double())
        gaussian = model.posterior.kind == "diagonal_gaussian"
        mean, logvar = encoded if gaussian else (encoded, None)
        given = (posterior.mean, posterior.logvar, posterior.std) if gaussian else (posterior.mean,)
        rounding.assert_near(given, _encoded, module, x)
        assert posterior.mode() is posterior.mean

        z = noise.normals(5, noise.PRIOR, 0, 9, mean[0].numel()).reshape(mean.shape)
        parameters = vae.likelihood(z)
        assert tuple(parameters) == DECODER_OUTPUTS[model.likelihood.kind]
        rounding.assert_near(tuple(parameters.values()), _decoded, module, z)
        rounding.assert_near([vae.decode(z)], lambda m, z: _decoded(m, z)[:1], module, z)
        if model.likelihood.kind == "none":
            return

        eps = noise.normals(3, noise.POSTERIOR, 100, 9, mean[0].numel()).reshape(mean.shape)
        log_prob = log_prob_of(model.likelihood, model.data)
        exact = torch_elbo(module, log_prob, torch.from_numpy(x).double(), torch.from_numpy(eps).double())
        drawn = module.decode(mean + torch.exp(logvar / 2) * torch.from_numpy(eps).double())
        terms = log_prob(torch.from_numpy(x).double(), drawn).abs().flatten(1).sum(1).numpy()
        scale = terms + exact.kl.numpy()
        found = vae.elbo(x, seed=3, start=100)
        for got, expected in ((found.reconstruction, exact.reconstruction), (found.kl, exact.kl)):
            assert (np.abs(got - expected.numpy()) <= RELATIVE * scale).all()
        np.testing.assert_array_equal(found.elbo, found.reconstruction - found.kl)
        redrawn, plain = vae.reconstruct(x, seed=3, start=100), vae.reconstruct(x)
        rounding.assert_near([redrawn], lambda m, x, e: _decoded(m, _drawn(m, x, e))[:1], module, x, eps)
        rounding.assert_near([plain], lambda m, x: _decoded(m, _encoded(m, x)[0])[:1], module, x)


def _encoded(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Mean, and where there is a variance its logarithm and the deviation."""
    encoded = module.encode(x)
    return (*encoded, torch.exp(encoded[1] / 2)) if isinstance(encoded, tuple) else (encoded,)


def _decoded(module: Any, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
    decoded = module.decode(z)
    return decoded if isinstance(decoded, tuple) else (decoded,)


def _drawn(module: Any, x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    mean, _, std = _encoded(module, x)
    return mean + std * eps


@pytest.mark.parametrize("place", [place for place in PLACES if place != "cpu build"])  # it is the same backend
@pytest.mark.parametrize("micro_batch", [1, 2, 7, 64])
def test_micro_batches_change_nothing(case: Any, place: str, placed: Callable[..., Any], micro_batch: int) -> None:
    x = examples(case.source, 20)
    size = dict(zip(("height", "width"), case.source.example_shape[1:], strict=False))
    size = size if "named" in case.bundle.name else None
    split = SPLIT.get(place, 1e-5)
    with (
        vae_export.load(case.bundle, micro_batch=micro_batch, **placed(case.bundle, place)) as cut,
        vae_export.load(case.bundle, micro_batch=1000, **placed(case.bundle, place)) as whole,
    ):
        for call in (
            lambda vae: vae.encode(x).mean,
            lambda vae: vae.sample(20, seed=1, size=size),
            lambda vae: vae.reconstruct(x),
            lambda vae: vae.edit(x, np.ones(vae.encode(x).mean.shape[1:]), 0.5),
            lambda vae: vae.interpolate(x[:3], x[3:6], steps=4),
        ):
            close(call(cut), call(whole), split)
        if is_picture(case.source.example_shape):
            levels = [vae.generate(20, seed=1, size=size).astype(int) for vae in (cut, whole)]
            assert np.abs(levels[0] - levels[1]).max() <= 1
        if case.source.model.likelihood.kind != "none":
            close(cut.elbo(x, seed=2).elbo, whole.elbo(x, seed=2).elbo, split)
            close(cut.log_likelihood(x, k=5, seed=2), whole.log_likelihood(x, k=5, seed=2), split)
            # A draw of p(x|z) is a threshold away from its mean: equal but where rounding crosses it.
            drawn = [vae.sample(20, seed=1, draw=True, size=size) for vae in (cut, whole)]
            assert np.mean(np.abs(drawn[0] - drawn[1]) > 1e-5) < 1e-3


def close(a: np.ndarray, b: np.ndarray, share: float = 1e-6) -> None:
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= share * np.abs(b).max()


def test_an_example_is_the_same_in_every_batch_and_thread(digits: dict[str, Path]) -> None:
    """Sample i of seed s from batches of 1, 7, 64, 1000 and from 8 threads."""
    with vae_export.load(digits["bernoulli"], micro_batch=1000) as vae:
        whole = vae.sample(1000, seed=42)
        for batch in (1, 7, 64):
            starts = range(0, 1000, batch)
            parts = [vae.sample(min(batch, 1000 - start), seed=42, start=start) for start in starts]
            close(np.concatenate(parts), whole)
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(lambda start: vae.sample(20, seed=42, start=start), range(0, 1000, 20)))
        close(np.concatenate(parts), whole)
        posterior = vae.encode(np.tile(whole[:1], (50, 1, 1, 1)))
        drawn = posterior.sample(seed=1, start=10)
        part = vae_export.Posterior(posterior.mean[5:9], posterior.logvar[5:9]).sample(seed=1, start=15)
        assert np.array_equal(part, drawn[5:9])


def test_small_integers_do_not_wrap(digits: dict[str, Path]) -> None:
    with vae_export.load(digits["bernoulli"], micro_batch=np.uint8(50)) as vae:
        close(vae.sample(100, start=np.uint8(200)), vae.sample(300)[200:])


def test_a_stream_in_pieces_is_the_whole(digits: dict[str, Path], images: np.ndarray) -> None:
    x = images[:50]
    with vae_export.load(digits["gaussian"]) as vae:
        for method in (
            lambda x, start: vae.elbo(x, seed=1, start=start).elbo,
            lambda x, start: vae.log_likelihood(x, k=3, seed=1, start=start),
            lambda x, start: vae.reconstruct(x, seed=1, start=start),
        ):
            close(np.concatenate([method(x[:13], 5), method(x[13:], 18)]), method(x, 5))


def test_many_threads_at_once(digits: dict[str, Path], images: np.ndarray) -> None:
    with vae_export.load(digits["gaussian"], micro_batch=16) as vae:
        expected = vae.elbo(images[:40], seed=1).elbo
        barrier = threading.Barrier(8)

        def work(_: int) -> np.ndarray:
            barrier.wait()
            return np.stack([vae.elbo(images[:40], seed=1).elbo for _ in range(10)])

        with ThreadPoolExecutor(8) as pool:
            for result in pool.map(work, range(8)):
                close(result, np.tile(expected, (10, 1)))


def test_importance_weighted_bound(digits: dict[str, Path], images: np.ndarray) -> None:
    with vae_export.load(digits["gaussian"]) as vae:
        x = images[:60]
        means = [vae.log_likelihood(x, k=k).mean() for k in (1, 10, 100)]
        assert means[0] < means[1] < means[2]
        assert means[2] > vae.elbo(x).elbo.mean()
        # One draw is the three-term estimate of the ELBO, with the ELBO's own draw.
        posterior = vae.encode(x)
        eps = noise.normals(0, noise.POSTERIOR, 0, 60, 8)
        one = elbo.monte_carlo_elbo(vae.elbo(x).reconstruction, posterior.sample(), eps, posterior.logvar)
        np.testing.assert_allclose(vae.log_likelihood(x, k=1), one, rtol=1e-9)


def test_edit_and_interpolate(digits: dict[str, Path], images: np.ndarray) -> None:
    with vae_export.load(digits["gaussian"]) as vae:
        a, b = images[:4], images[4:8]
        line = vae.interpolate(a, b, steps=5)
        assert line.shape == (4, 5, 1, 8, 8)
        close(line[:, 0], vae.reconstruct(a))
        close(line[:, -1], vae.reconstruct(b))
        direction = vae.encode(b).mean - vae.encode(a).mean
        np.testing.assert_allclose(vae.edit(a, direction, 1.0), vae.reconstruct(b), atol=1e-5)
        close(vae.edit(a, direction[0], 0.0), vae.reconstruct(a))


def test_pictures_of_bytes(digits: dict[str, Path], member: Callable[[str], Any]) -> None:
    pixels = np.arange(128, dtype=np.uint8).reshape(2, 1, 8, 8) * 2
    with vae_export.load(digits["bernoulli"]) as vae:
        close(vae.encode(pixels).mean, vae.encode(pixels / np.float32(255)).mean)
    with vae_export.load(member("spatial").bundle) as vae:  # its range is [-1, 1]
        pixels = (np.arange(3 * 16 * 24) % 256).astype(np.uint8).reshape(1, 3, 16, 24)
        close(vae.encode(pixels).mean, vae.encode(pixels / np.float32(127.5) - np.float32(1)).mean)


LAYOUTS = {
    "reversed": lambda x: x[::-1].copy()[::-1],
    "Fortran": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, axis=3)[..., ::2],
    "transposed": lambda x: x.transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2),
    "tensor": torch.from_numpy,
    "read-only": lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape),
    "unaligned": lambda x: np.frombuffer(b"0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_memory_layout(digits: dict[str, Path], layout: Callable[[np.ndarray], Any]) -> None:
    x = zoo.pictures(4, (1, 8, 8))
    with vae_export.load(digits["bernoulli"]) as vae:
        assert np.array_equal(vae.encode(layout(x)).mean, vae.encode(x).mean)


GOOD = np.full((2, 1, 8, 8), 0.5, np.float32)


def with_value(value: float) -> np.ndarray:
    x = GOOD.copy()
    x[1, 0, 2, 3] = value
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (GOOD[0], r"encode: x has shape \(1, 8, 8\); this bundle expects \(B, 1, 8, 8\)\. For one example add a batch"),
        (GOOD[0, 0], r"x has shape \(8, 8\); .* Reshape x to 4 dimensions, the batch first"),
        (GOOD[None], r"x has shape \(1, 2, 1, 8, 8\); .* Reshape x to 4 dimensions"),
        (np.float32(1.0), "x is a float32; pass a NumPy array|Reshape x to 4 dimensions"),
        (np.zeros((4, 1, 9, 8), np.float32), r"x has shape \(4, 1, 9, 8\); .* Resize or crop the examples"),
        (GOOD[:0], r"x has shape \(0, 1, 8, 8\); .* The batch is empty; pass one example or more"),
        (
            GOOD.astype(np.float64),
            r"x has dtype float64; expected float32 \(or uint8 pictures\).*astype\(numpy\.float32",
        ),
        (GOOD.astype(np.int64), r"x has dtype int64; expected float32"),
        (GOOD.astype(complex), r"x has dtype complex128; expected float32"),
        (GOOD.astype(object), r"x has dtype object; expected float32"),
        (GOOD.astype(">f4"), r"x is big-endian float32, which backends would misread.*x\.astype\('=f4'\)"),
        (with_value(np.nan), r"x\[1, 0, 2, 3\] is nan, one of 1 such values; expected values in \[0, 1\]"),
        (with_value(np.inf), r"x\[1, 0, 2, 3\] is inf"),
        (with_value(1.5), r"x\[1, 0, 2, 3\] is 1\.5, .* expected values in \[0, 1\]\. Scale the data, or pass uint8"),
        (with_value(-0.25), r"x\[1, 0, 2, 3\] is -0\.25"),
        ([[1.0]], r"x is a list; pass a NumPy array of shape \(B, 1, 8, 8\)"),
        (None, "x is a NoneType; pass a NumPy array"),
        (np.ma.masked_array(GOOD, GOOD > 0), r"x is a masked array; fill its gaps first: x\.filled\(0\)"),
        (torch.ones(1, requires_grad=True), "x is a Tensor that NumPy cannot read: "),
    ],
)
def test_bad_data(digits: dict[str, Path], x: Any, message: str) -> None:
    with vae_export.load(digits["bernoulli"]) as vae, pytest.raises(InputError, match=message):
        vae.encode(x)


def test_negative_zero_is_zero(digits: dict[str, Path]) -> None:
    with vae_export.load(digits["bernoulli"]) as vae:
        close(vae.encode(with_value(-0.0)).mean, vae.encode(with_value(0.0)).mean)


def test_a_gaussian_takes_any_finite_value(digits: dict[str, Path]) -> None:
    with vae_export.load(digits["gaussian"], check_range=False) as vae:
        vae.encode(with_value(1.5))
        vae.decode(np.full((1, 8), 3e19, np.float32))  # whose square is not finite in float32
        with pytest.raises(InputError, match=r"x\[1, 0, 2, 3\] is nan, one of 1 such values; expected finite"):
            vae.encode(with_value(np.nan))


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (np.zeros((4, 9), np.float32), r"decode: z has shape \(4, 9\); this bundle expects \(B, 8\)\. Pass latents"),
        (np.zeros((4, 8), np.uint8), r"decode: z has dtype uint8; expected float32\."),
        (np.full((1, 8), np.inf, np.float32), r"decode: z\[0, 0\] is inf, one of 8 such values; expected finite"),
        (np.zeros((1, 8), ">f4"), "decode: z is big-endian"),
    ],
)
def test_bad_latents(digits: dict[str, Path], z: np.ndarray, message: str) -> None:
    with vae_export.load(digits["gaussian"]) as vae, pytest.raises(InputError, match=message):
        vae.decode(z)


def test_named_sizes(member: Callable[[str], Any]) -> None:
    with vae_export.load(member("spatial-named").bundle) as vae:
        assert vae.sample(2, size={"height": 8, "width": 20}).shape == (2, 3, 8, 20)
        for height, width in ((4, 8), (32, 12)):
            x = examples(member("spatial").source, 1)[:, :, :1, :1] * np.ones((1, 3, height, width), np.float32)
            assert vae.encode(x).mean.shape == (1, 4, height // 4, width // 4)
            assert vae.reconstruct(x).shape == x.shape
        with pytest.raises(InputError, match=r"expects \(B, 3, height, width\).*\(height \(a multiple of 4\); width"):
            vae.encode(np.zeros((1, 3, 10, 8), np.float32))
        with pytest.raises(InputError, match=r"size: this model takes height \(a multiple of 4\), width"):
            vae.sample(1)


def test_what_a_model_does_not_have(member: Callable[[str], Any]) -> None:
    with vae_export.load(member("plain").bundle) as vae:
        x = np.zeros((2, 12), np.float32)
        with pytest.raises(InputError, match="no likelihood"):
            vae.elbo(x)
        with pytest.raises(InputError, match="no likelihood"):
            vae.sample(1, draw=True)
        for call in (vae.encode(x).sample, vae.encode(x).kl, lambda: vae.reconstruct(x, seed=0)):
            with pytest.raises(InputError, match="encoder is deterministic: its posterior has no variance"):
                call()
        assert vae.encode(x).logvar is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.sample(0), "sample: n is 0; expected 1 or more"),
        (lambda vae: vae.sample(1.5), r"sample: n is 1\.5; expected an integer"),
        (lambda vae: vae.sample(1, seed=-1), r"seed is -1; expected 0 to 2\^64 - 1"),
        (lambda vae: vae.sample(1, start=-1), "sample: start is -1; expected 0 or more"),
        (lambda vae: vae.elbo(GOOD, start=1.5), r"elbo: start is 1\.5; expected an integer"),
        (lambda vae: vae.sample(1, size=5), "size: expected names and sizes such as .* got 5"),
        (lambda vae: vae.log_likelihood(GOOD, k=0), "log_likelihood: k is 0; expected 1 or more"),
        (lambda vae: vae.interpolate(GOOD, GOOD, steps=1), "interpolate: steps is 1; expected 2 or more"),
        (lambda vae: vae.interpolate(GOOD, GOOD[:1]), "interpolate: a and b must have one shape"),
        (
            lambda vae: vae.edit(GOOD, np.zeros(3), 1.0),
            r"direction has shape \(3,\); expected finite values of shape \(8\)",
        ),
        (lambda vae: vae.edit(GOOD, np.full(8, np.nan), 1.0), "expected finite values"),
        (lambda vae: vae.edit(GOOD, "abc", 1.0), "edit: direction has dtype <U3; expected numbers"),
        (lambda vae: vae.edit(GOOD, np.zeros(8), "a"), "edit: strength is 'a'; expected a finite number"),
        (lambda vae: vae.edit(GOOD, np.ones(8), 1e39), r"edit: z\[0, 0\] is inf"),
        (lambda vae: vae.edit(GOOD, np.zeros(8), np.inf), "edit: strength is inf; expected a finite number"),
        (lambda vae: vae.sample(1, size={"height": 3}), "this model takes no sizes; got"),
    ],
)
def test_bad_arguments(digits: dict[str, Path], call: Callable[[vae_export.VAE], object], message: str) -> None:
    with vae_export.load(digits["bernoulli"]) as vae, pytest.raises(InputError, match=message):
        call(vae)


def test_bad_options(digits: dict[str, Path]) -> None:
    path = digits["bernoulli"]
    with pytest.raises(InputError, match="device is 'tpu'; expected 'auto', 'cpu' or 'cuda'"):
        vae_export.load(path, device="tpu")
    with pytest.raises(InputError, match="lanes is 0; expected a number from 1 to 64"):
        vae_export.load(path, lanes=0)
    with pytest.raises(InputError, match=r"captures CUDA graphs in one lane only; lanes is 2\. Ask for one"):
        vae_export.load(path, device="cuda", cuda_graphs=True, lanes=2)
    with pytest.raises(InputError, match="cuda_graphs is 'yes'; expected True, False or None"):
        vae_export.load(path, cuda_graphs="yes")
    with pytest.raises(InputError, match="micro_batch is 0; expected 1 or more"):
        vae_export.load(path, micro_batch=0)
    with pytest.raises(InputError, match="threads is 0; expected a number from 1 on, or None"):
        vae_export.load(path, threads=0)


def test_a_device_that_is_not_there_is_an_error(digits: dict[str, Path]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine's ONNX Runtime has CUDA: its absence cannot be tested")
    with pytest.raises(BackendError, match=r"needs ONNX Runtime's CUDAExecutionProvider; the installed .*\[gpu\]"):
        vae_export.load(digits["bernoulli"], device="cuda")


@pytest.mark.parametrize("place", PLACES)
def test_pictures_are_the_samples_as_bytes(
    member: Callable[[str], Any], place: str, placed: Callable[..., Any]
) -> None:
    case = member("conv-gaussian")
    with vae_export.load(case.bundle, **placed(case.bundle, place)) as vae:
        pictures = vae.generate(5, seed=3, start=2)
        assert (pictures.shape, pictures.dtype) == ((5, 8, 12, 3), np.uint8)
        assert pictures.flags.c_contiguous
        exact = (vae.sample(5, seed=3, start=2).transpose(0, 2, 3, 1) * 255.0).clip(0, 255)
        assert np.abs(pictures - exact).max() <= 0.5 + 1e-3


def test_pictures_of_what_is_none(member: Callable[[str], Any]) -> None:
    message = r"generate: this model's data \(B, 12\) are no pictures"
    with vae_export.load(member("plain").bundle) as vae, pytest.raises(InputError, match=message):
        vae.generate(1)


class OnAGpu:
    """What an array of another library says of itself when it lies on a GPU."""

    shape, dtype = (2, 1, 8, 8), "torch.float32"

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


class Numbas:
    """An array on a GPU that knows the CUDA array interface only."""

    __cuda_array_interface__: ClassVar[dict[str, Any]] = {}


@pytest.mark.parametrize("array", [OnAGpu(), Numbas()])
def test_the_cpu_takes_no_arrays_of_a_gpu(digits: dict[str, Path], array: Any) -> None:
    with vae_export.load(digits["bernoulli"], device="cpu") as vae:
        for verb in (vae.encode, vae.decode, vae.reconstruct):
            with pytest.raises(InputError, match=r"lies on a GPU, and this VAE runs on the CPU\. Pass a NumPy array"):
                verb(array)
        for draw in (vae.sample, vae.generate):
            with pytest.raises(InputError, match="on_device is for a GPU, and this VAE runs on the CPU"):
                draw(1, on_device=True)


def test_what_is_asked_of_an_array_on_a_gpu(digits: dict[str, Path]) -> None:
    """Before it goes anywhere: shape and type, as it tells them itself."""
    check = ArrayCheck("x", vae_export.Bundle(digits["bernoulli"]).manifest.model, on_gpu=True)
    good, wrong = OnAGpu(), OnAGpu()
    assert check.anywhere("encode", good) == (good, True)
    with pytest.raises(InputError, match="encode: x is a Numbas without a shape and a dtype"):
        check.anywhere("encode", Numbas())
    wrong.dtype = "torch.float16"
    with pytest.raises(InputError, match=r"x has dtype float16 on the GPU; expected float32\. Convert it there"):
        check.anywhere("encode", wrong)
    wrong.shape = (2, 1, 9, 8)
    with pytest.raises(InputError, match=r"encode: x has shape \(2, 1, 9, 8\); this bundle expects"):
        check.anywhere("encode", wrong)


def test_describe(digits: dict[str, Path]) -> None:
    with vae_export.load(digits["gaussian"], threads=1, micro_batch=8) as vae:
        found = vae.describe()
    assert found["provider"] == "CPUExecutionProvider"
    assert found["backend"] == "onnxruntime"
    assert (found["threads"], found["micro_batch"], found["device"]) == (1, 8, "cpu")
    assert (found["data"], found["latent"], found["likelihood"]) == ("(B, 1, 8, 8)", "(B, 8)", "gaussian")
    assert found["bundle"] == "gaussian"


def test_a_bundle_that_contradicts_itself(member: Callable[[str], Any], tmp_path: Path) -> None:
    """A graph with right hashes and wrong results: it upsamples by 1.5."""
    import shutil

    import onnx
    from test_bundle import reseal

    path = Path(shutil.copytree(member("conv-bernoulli").bundle, tmp_path / "b"))
    model = onnx.load(path / "vae_decoder" / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.dims == [4]:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([1, 1, 1.5, 1.5], np.float32), tensor.name))
    (path / "vae_decoder" / "model.onnx").write_bytes(model.SerializeToString())
    reseal(path)
    # Whether ONNX Runtime sees it when it opens the graph depends on the layout of channels that suits the processor.
    with pytest.raises(BundleError, match=r"decoder.* the manifest promises .*The bundle contradicts itself"):
        vae_export.load(path).sample(1)


def test_a_graph_that_gives_another_shape(member: Callable[[str], Any]) -> None:
    """A shape that depends on values, which no runner sees before the graph runs: 8 × 8 instead of 12 × 12."""
    from onnx import TensorProto, helper, numpy_helper

    model = msgspec.structs.replace(
        member("conv-bernoulli").source.model, data=Data(shape=(1, 12, 12), range=(0.0, 1.0))
    )
    nodes = [
        helper.make_node("ReduceMax", ["z"], ["largest"], keepdims=1),
        helper.make_node("Mul", ["largest", "zero"], ["nothing"]),
        helper.make_node("Cast", ["nothing"], ["offset"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["offset", "one"], ["vector"]),
        helper.make_node("Shape", ["z"], ["batch"], end=1),
        helper.make_node("Concat", ["batch", "sizes"], ["small"], axis=0),
        helper.make_node("Add", ["small", "vector"], ["shape"]),
        *(helper.make_node("Expand", ["pixel", "shape"], [name]) for name in ("sample", "logits")),
    ]
    constants = {
        "zero": np.zeros(1, np.float32),
        "one": np.array([1]),
        "sizes": np.array([1, 8, 8]),
        "pixel": np.full((1, 1, 1, 1), 0.5, np.float32),
    }
    ends = [
        [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in side]
        for side in model.signature("decoder")
    ]
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "decoder", *ends, weights)
    raw = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    message = r"the decoder gave shape \(\d+, 1, 8, 8\); the manifest promises \(\d+, 1, 12, 12\)"
    with VAE(model, CpuBackend({"decoder": [planned(raw)]}, model, Settings()), micro_batch=512) as vae:
        for n in (1, 512, 1000):  # large results are written to `out` by ONNX Runtime itself
            for out in (None, np.empty((n, 1, 12, 12), np.float32)):
                with pytest.raises(BundleError, match=message):
                    vae.sample(n, out=out)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda graph: setattr(graph.input[0], "name", "y"),
            "decoder: the manifest promises .*'z'.* the graph has .*'y'",
        ),
        (lambda graph: graph.output.pop(), "decoder: the manifest promises .*'sample', .* the graph has"),
        (lambda graph: setattr(dims(graph.input[0])[0], "dim_value", 3), r"and the graph has \[\('z'.*\(3, "),
    ],
)
def test_a_graph_that_is_not_as_the_manifest_says(
    member: Callable[[str], Any], tmp_path: Path, edit: Callable[[Any], object], message: str
) -> None:
    import shutil

    import onnx
    from test_bundle import reseal

    path = Path(shutil.copytree(member("mlp-bernoulli").bundle, tmp_path / "b"))
    model = onnx.load(path / "vae_decoder" / "model.onnx")
    edit(model.graph)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "z":
                node.input[index] = model.graph.input[0].name
    (path / "vae_decoder" / "model.onnx").write_bytes(model.SerializeToString())
    reseal(path)
    with pytest.raises(BundleError, match=message):
        vae_export.load(path)


def dims(value: Any) -> Any:
    return value.type.tensor_type.shape.dim


def test_latents_of_a_size_that_the_data_cannot_have(member: Callable[[str], Any]) -> None:
    message = r"z has shape \(1, 4, 0, 5\); this bundle expects \(B, 4, height/4"
    with vae_export.load(member("spatial-named").bundle) as vae, pytest.raises(InputError, match=message):
        vae.decode(np.zeros((1, 4, 0, 5), np.float32))


def test_closed(digits: dict[str, Path]) -> None:
    vae = vae_export.load(digits["gaussian"])
    vae.close()
    with pytest.raises(BackendError, match="this VAE was closed"):
        vae.sample(1)
