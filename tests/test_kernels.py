"""The noise of the GPU: `kernels.cu` run on the host against `noise`, and compiled by NVRTC for every kind of GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_noise import KNOWN

from vae_export.errors import BackendError
from vae_export.numerics import noise
from vae_export.runtimes.gpu import device
from vae_export.runtimes.gpu.lanes import bucket

pytestmark = pytest.mark.quick

# What CUDA has and C++ has not. A kernel runs once for each thread of its grid, and for some beyond: a launch has
# whole blocks.
HOST = """
#include <cmath>
#define __device__
#define __global__
#define __forceinline__ inline
struct Dim { unsigned x; };
static Dim threadIdx, blockIdx, blockDim;
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
#include "kernels.cu"

template <typename Kernel, typename... Arguments> void launch(Kernel kernel, u64 threads, Arguments... arguments) {
    blockDim.x = 64;
    for (blockIdx.x = 0; blockIdx.x * 64ULL < threads; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < 64; ++threadIdx.x) kernel(arguments...);
}

extern "C" void run_words(u32 *out, u64 count, u64 size, u64 first, u64 seed, u64 stream, u64 draw) {
    launch(vae_words, count * ((size + 7) / 8), out, count, size, first, seed, stream, draw);
}
extern "C" void run_normals(float *out, u64 count, u64 size, u64 first, u64 seed, u64 stream, u64 draw) {
    launch(vae_normals, count * ((size + 7) / 8), out, count, size, first, seed, stream, draw);
}
extern "C" void run_reparameterize(float *z, const float *mean, const float *logvar, const float *eps, u64 n) {
    launch(vae_reparameterize, n, z, mean, logvar, eps, n);
}
extern "C" void run_philox(const u64 *counter, const u64 *key, u64 *result) {
    Block block = philox(counter[0], counter[1], counter[2], key[0], key[1]);
    for (int i = 0; i < 4; ++i) result[i] = block.word[i];
}
"""
SOURCE = resources.files("vae_export.runtimes.gpu").joinpath("kernels.cu").read_text(encoding="utf-8")
#: Around what a kernel writes.
GUARD = 16
CELL = np.uint32(0xDEADBEEF)

Fill = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as a library for the CPU."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++): the kernels cannot run on the host")
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.cu").write_text(SOURCE)
    (folder / "host.cpp").write_text(HOST)
    # Without contraction a product and a sum are rounded one after the other, as NumPy does it.
    flags = ["-O2", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Werror"]
    command = [compiler, *flags, "host.cpp", "-o", "host.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "host.so"))


def fill(library: ctypes.CDLL, kernel: str, *, like: Any, address: tuple[int, ...]) -> np.ndarray:
    """Let a kernel fill an array (count, size) that lies between guards, which it must leave as they are."""
    seed, stream, first, count, size, draw = address
    memory = np.full(count * size + 2 * GUARD, CELL, np.uint32)
    target = ctypes.c_void_p(memory.ctypes.data + 4 * GUARD)
    getattr(library, kernel)(target, *map(ctypes.c_uint64, (count, size, first, seed, stream, draw)))
    assert (memory[:GUARD] == CELL).all()
    assert (memory[len(memory) - GUARD :] == CELL).all()
    return memory[GUARD : len(memory) - GUARD].view(like).reshape(count, size)


def same(library: ctypes.CDLL, *address: int) -> None:
    """Words and normals of an address, bit by bit as `noise` makes them."""
    words, normals = noise.words(*address), noise.normals(*address)
    assert np.array_equal(fill(library, "run_words", like=np.uint32, address=address), words)
    assert np.array_equal(fill(library, "run_normals", like=np.float32, address=address), normals)


LAST = (1 << 64) - 1


@pytest.mark.parametrize("size", [*range(1, 18), 64, 1000])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_size(host: ctypes.CDLL, count: int, size: int) -> None:
    same(host, 42, noise.PRIOR, 12345, count, size, 0)


@pytest.mark.parametrize("seed", [0, LAST])
@pytest.mark.parametrize("stream", [0, LAST])
@pytest.mark.parametrize("first", [0, LAST - 4])
@pytest.mark.parametrize("draw", [0, LAST])
def test_both_ends_of_every_number(host: ctypes.CDLL, seed: int, stream: int, first: int, draw: int) -> None:
    same(host, seed, stream, first, 5, 17, draw)


@pytest.mark.parametrize("size", [8, 9, 16, 17, 24, 1000])
def test_the_counter_carries_into_its_second_word(host: ctypes.CDLL, size: int) -> None:
    """Where example · blocks passes 2^64, between two examples or inside of one."""
    blocks = -(-size // noise.HALVES)
    for first in {max(0, min(LAST - 4, multiple * (1 << 64) // blocks - 2)) for multiple in range(1, blocks + 1)}:
        same(host, 1, 2, first, 5, size, 3)


word = st.one_of(st.integers(0, LAST), st.sampled_from([0, 1, 1 << 32, (1 << 32) - 1, 1 << 63, LAST]))


@settings(deadline=None, max_examples=300)
@given(word, word, st.integers(0, LAST - 4), st.integers(1, 5), st.integers(1, 17), word)
def test_every_address(host: ctypes.CDLL, seed: int, stream: int, first: int, count: int, size: int, draw: int) -> None:
    same(host, seed, stream, first, count, size, draw)


def test_nothing_is_written_for_nothing(host: ctypes.CDLL) -> None:
    for count, size in ((0, 5), (5, 0), (0, 0)):
        assert fill(host, "run_words", like=np.uint32, address=(1, 2, 3, count, size, 0)).size == 0


def test_a_million_normals(host: ctypes.CDLL) -> None:
    """Enough for every branch of the sine, and for words near both ends."""
    same(host, 9, noise.POSTERIOR, 0, 1000, 1000, 0)


@pytest.mark.parametrize(("counter", "key", "result"), [known for known in KNOWN if known[0][3] == 0])
def test_known_answers(
    host: ctypes.CDLL, counter: tuple[int, ...], key: tuple[int, ...], result: tuple[int, ...]
) -> None:
    """Random123's vectors, as far as their counter's fourth word is 0, as it always is here."""
    found = np.zeros(4, np.uint64)
    into = [np.array(part, np.uint64) for part in (counter, key)]
    host.run_philox(*(ctypes.c_void_p(array.ctypes.data) for array in (*into, found)))
    assert tuple(map(int, found)) == result
    assert counter == (0, 0, 0, 0)
    words = fill(host, "run_words", like=np.uint32, address=(*key, 0, 1, 8, 0))[0]
    assert [int(half) for half in words] == [half for w in result for half in (w & 0xFFFFFFFF, w >> 32)]


@pytest.mark.parametrize("n", [1, 63, 64, 65, 10_000])
@pytest.mark.parametrize("in_place", [False, True])
def test_reparameterize(host: ctypes.CDLL, n: int, in_place: bool) -> None:
    """Mean + exp(½ logvar) · eps in NumPy's float32, exp rounded once from float64: z may be where eps is."""
    mean, logvar, eps = noise.normals(1, 2, 0, 3, n) * np.array([[3], [10], [1]], np.float32)
    memory = np.full(n + 2 * GUARD, CELL, np.uint32).view(np.float32)
    memory[GUARD:-GUARD] = eps
    guards = memory.view(np.uint32)[[*range(GUARD), *range(-GUARD, 0)]].copy()
    z = memory[GUARD:-GUARD]
    arrays = (z, mean, logvar, z if in_place else eps)
    host.run_reparameterize(*(ctypes.c_void_p(a.ctypes.data) for a in arrays), ctypes.c_uint64(n))
    std = np.exp(np.float64(0.5) * logvar).astype(np.float32)
    expected = mean + std * eps
    assert expected.dtype == np.float32
    assert np.array_equal(z, expected)
    # The host takes float32's own exp, which NumPy rounds to 4 units in the last place on every processor.
    on_host = mean + np.exp(np.float32(0.5) * logvar) * eps
    assert (np.abs(z - on_host) <= 4 * np.spacing(std) * np.abs(eps) + np.spacing(np.abs(z))).all()
    assert np.array_equal(memory.view(np.uint32)[[*range(GUARD), *range(-GUARD, 0)]], guards)


@pytest.fixture
def cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """NVIDIA's cuda.core, and an empty cache."""
    pytest.importorskip("cuda.core", reason="cuda.core is not installed: NVRTC cannot be asked")
    import cuda.core

    monkeypatch.setenv("VAE_EXPORT_CACHE", str(tmp_path / "cache"))
    return cuda.core


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "8.9", "9.0", "12.0"])
def test_nvrtc_takes_the_kernels(cuda: Any, tmp_path: Path, capability: str) -> None:
    made = [bytes(device.compile_kernels(cuda, capability).code) for _ in range(2)]
    assert made[0] == made[1]  # the second is from the cache
    assert made[0][:4] == b"\x7fELF"
    assert all(name.encode() in made[0] for name in device.KERNELS)
    assert any(path.is_file() for path in (tmp_path / "cache" / "kernels").rglob("*"))


def test_every_kernel_is_in_the_source() -> None:
    assert SOURCE.count("__global__") == len(device.KERNELS)
    assert all(f'extern "C" __global__ void {name}(' in SOURCE for name in device.KERNELS)


def test_without_a_cache_they_are_made_again(cuda: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    (tmp_path / "cache").chmod(0o755)
    assert bytes(device.compile_kernels(cuda, "8.6").code)[:4] == b"\x7fELF"
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("capability", ["3.0", "99.9"])
def test_a_gpu_that_nvrtc_does_not_know(cuda: Any, capability: str) -> None:
    message = (
        r"(?s)the kernels that make noise on the GPU cannot be compiled: .*Run: pip install 'nvidia-cuda-nvrtc==13"
    )
    with pytest.raises(BackendError, match=message):
        device.compile_kernels(cuda, capability)


def test_no_nvrtc(cuda: Any, tmp_path: Path) -> None:
    """A process in which no library of this name can be found."""
    program = (
        "from cuda.pathfinder import DynamicLibNotFoundError\n"
        "def none(name, *_, **__): raise DynamicLibNotFoundError(f'no {name} here')\n"
        "import cuda.pathfinder as pathfinder\n"
        "pathfinder.load_nvidia_dynamic_lib = none\n"
        "import cuda.core\n"
        "from vae_export.errors import BackendError\n"
        "from vae_export.runtimes.gpu import device\n"
        "try: device.compile_kernels(cuda.core, '8.6')\n"
        "except BackendError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the kernels that make noise on the GPU cannot be compiled: " in done.stdout
    assert "nvrtc" in done.stdout
    assert "Run: pip install 'nvidia-cuda-nvrtc==13.*'" in done.stdout


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16), (16, 16), (17, 24), (63, 64), (64, 64), (65, 72)],
)
def test_buckets(n: int, expected: int) -> None:
    assert bucket(n) == expected


@given(st.integers(1, 100_000))
def test_a_bucket_holds_its_batch_and_little_more(n: int) -> None:
    assert n <= bucket(n) <= n + 7
    assert bucket(bucket(n)) == bucket(n)
