"""Addressed noise: Random123's vectors, an independent Philox, and independence of every split."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vae_export.errors import InputError
from vae_export.numerics import noise

pytestmark = pytest.mark.quick

# Random123's kat_vectors for philox4x64-10: counter, key, result.
KNOWN = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ),
    (
        (0xFFFFFFFFFFFFFFFF,) * 4,
        (0xFFFFFFFFFFFFFFFF,) * 2,
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
]


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox 4×64-10 as Salmon et al. 2011 define it, in plain integers."""
    mask = (1 << 64) - 1
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & mask, (p0 >> 64) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c0, c1, c2, c3


def addressed(seed: int, stream: int, index: int, size: int, draw: int) -> list[int]:
    """The words of one example by the design's text."""
    blocks = (size + 7) // 8
    found = []
    for block in range(blocks):
        low = index * blocks + block
        words = philox((low & ((1 << 64) - 1), low >> 64, draw, 0), (seed, stream))
        found += [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
    return found[:size]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], result: tuple[int, ...]) -> None:
    assert philox(counter, key) == result
    value = sum(word << 64 * place for place, word in enumerate(counter))
    # NumPy's generator, from which `words` takes its numbers, counts up first.
    raw = np.random.Philox(counter=(value - 1) % (1 << 256), key=np.array(key, np.uint64)).random_raw(4)
    assert tuple(map(int, raw)) == result


def test_known_answer_through_the_address() -> None:
    halves = noise.words(0, 0, 0, 1, 8)[0]
    assert [int(half) for half in halves] == [h for w in KNOWN[0][2] for h in (w & 0xFFFFFFFF, w >> 32)]


word = st.integers(0, (1 << 64) - 1)


@settings(deadline=None, max_examples=60)
@given(word, word, st.integers(0, (1 << 64) - 3), st.integers(1, 40), word)
def test_every_address(seed: int, stream: int, index: int, size: int, draw: int) -> None:
    found = noise.words(seed, stream, index, 2, size, draw)
    assert found.tolist() == [addressed(seed, stream, index + i, size, draw) for i in range(2)]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 33), st.lists(st.integers(0, 64), min_size=1, max_size=5))
def test_splits_change_nothing(first: int, size: int, counts: list[int]) -> None:
    whole = noise.normals(3, noise.PRIOR, first, sum(counts), size)
    starts = np.cumsum([0, *counts])
    parts = [noise.normals(3, noise.PRIOR, first + s, c, size) for s, c in zip(starts[:-1], counts, strict=True)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_threads_change_nothing() -> None:
    whole = noise.normals(7, noise.POSTERIOR, 0, 800, 20)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: noise.normals(7, noise.POSTERIOR, i * 10, 10, 20), range(80)))
    assert np.array_equal(whole, np.concatenate(parts))


def test_normals_are_the_transform_of_their_words() -> None:
    words = noise.words(1, 2, 3, 50, 8).astype(np.float64)
    u, v = (words[:, 0::2] + 0.5) / 2**32, (words[:, 1::2] + 0.5) / 2**32
    radius = np.sqrt(-2 * np.log(u))
    expected = np.stack([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)], axis=-1)
    np.testing.assert_allclose(noise.normals(1, 2, 3, 50, 8), expected.reshape(50, 8), rtol=1e-6, atol=1e-7)


def test_normals_are_normal_and_independent() -> None:
    draws = np.concatenate([noise.normals(s, noise.PRIOR, 0, 20_000, 7, draw=d) for s in (0, 1) for d in (0, 1)])
    assert stats.kstest(draws.ravel(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(np.concatenate([draws, np.roll(draws, 1, axis=0)], axis=1).T) - np.eye(14)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(draws))
    assert draws.dtype == np.float32
    assert np.abs(draws).max() < 6.8


def test_addresses_do_not_meet() -> None:
    seen = set()
    for stream in range(5):
        for draw in range(3):
            for row in noise.words(0, stream, 0, 100, 9, draw):
                seen.add(row[:2].tobytes())
    assert len(seen) == 5 * 3 * 100


def test_permutation() -> None:
    order = noise.permutation(0, noise.TRAINER, 5, 1000)
    assert sorted(order) == list(range(1000))
    assert not np.array_equal(order, noise.permutation(0, noise.TRAINER, 6, 1000))


def test_zero_examples() -> None:
    assert noise.normals(0, 0, 0, 0, 5).shape == (0, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 0, 1, 4), r"noise: seed is -1; expected 0 to 2\^64 - 1"),
        ((0, 1 << 64, 0, 1, 4), r"stream is 18446744073709551616; expected 0 to 2\^64 - 1"),
        ((0, 0, -1, 1, 4), "first, count and size must not be negative"),
        ((0, 0, (1 << 64) - 1, 2, 4), r"first \+ count must not exceed 2\^64"),
        ((0.5, 0, 0, 1, 4), "must be integers: 'float' object"),
    ],
)
def test_bad_addresses(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        noise.normals(*arguments)
