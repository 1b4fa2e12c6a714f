"""Grids of pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vae_export.contract.model import Data
from vae_export.errors import InputError
from vae_export.numerics import images
from vae_export.numerics.pixels import to_uint8

pytestmark = pytest.mark.quick

BOX = Data(shape=(3, 10, 60), range=(-1.0, 1.0))


def test_to_uint8_clamps_and_rounds() -> None:
    x = np.array([-9.0, -1.0, 0.0, 0.996, 1.0, 9.0])
    assert to_uint8(x, (-1.0, 1.0)).tolist() == [0, 0, 128, 254, 255, 255]


@pytest.mark.parametrize(
    ("count", "columns", "size"), [(1, None, (1, 1)), (5, None, (3, 2)), (5, 4, (4, 2)), (2, 9, (2, 1))]
)
def test_grid(count: int, columns: int | None, size: tuple[int, int]) -> None:
    x = np.linspace(0, 1, count * 64, dtype=np.float32).reshape(count, 1, 8, 8)
    picture = images.grid(x, (0.0, 1.0), columns)
    assert picture.size == tuple(n * (48 + 3) + 3 for n in size)
    assert np.asarray(picture)[3 + 20, 3 + 20] == to_uint8(x, (0.0, 1.0))[0, 0, 3, 3]
    assert np.asarray(picture)[0].min() == 255


def test_colour_and_size() -> None:
    x = np.zeros((2, 3, 10, 60), np.float32)
    x[:, 0] = 1
    picture = np.asarray(images.grid(x, BOX.range, 1))
    assert picture.shape == (2 * (50 + 2) + 2, 300 + 4, 3)
    assert picture[10, 10].tolist() == [255, 128, 128]


def test_pairs() -> None:
    above, below = np.zeros((5, 1, 8, 8), np.float32), np.ones((5, 1, 8, 8), np.float32)
    picture = np.asarray(images.pairs(above, below, (0.0, 1.0), columns=3))
    rows = [picture[3 + r * 51 + 20, 3 + 20] for r in range(4)]
    assert rows == [0, 255, 0, 255]
    assert picture[3 + 2 * 51 + 20, 3 + 2 * 51 + 20] == 255  # there is no sixth picture


def test_arrays_need_no_pillow(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['PIL'] = None\nfrom pathlib import Path; import numpy as np\n"
        "from vae_export.contract.model import Data; from vae_export.numerics import images\n"
        "data, x = Data(shape=(3, 2, 2), range=(0.0, 1.0)), np.zeros((1, 3, 2, 2), np.float32)\n"
        "images.write(Path('x.npy'), x, data); assert np.array_equal(images.read('x.npy', data), x)\n"
        "try: images.write(Path('x.png'), x, data)\nexcept ImportError: print('blocked')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.stdout, done.stderr) == ("blocked\n", "")


def test_only_pictures_become_pictures() -> None:
    with pytest.raises(InputError, match=r"only data of shape \(1 or 3, H, W\) can be shown; write \.npy instead"):
        images.write(Path("x.png"), np.zeros((2, 12)), Data(shape=(12,), range=(0.0, 1.0)))
    with pytest.raises(InputError, match="this bundle's data are no pictures; pass array"):
        images.read(__file__, Data(shape=(12,), range=(0.0, 1.0)))
