"""Per-example scores of any number of examples, in pieces."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from vae_export.runtimes import VAE

_PIECE = 1024  # examples that are in memory at once: the array may be memory-mapped

Columns = dict[str, npt.NDArray[Any]]


def score(vae: VAE, x: npt.NDArray[Any], *, k: int | None = None, seed: int = 0, start: int = 0) -> Columns:
    """The ELBO and its terms, or the importance-weighted bound of `k` draws, of each example of x (B, *data).

    Returns:
        (B,) columns: `index`, and `elbo`, `reconstruction`, `kl` or `log_likelihood`, in nats.

    Raises:
        InputError: as for `VAE.elbo` and `VAE.log_likelihood`.
    """
    parts: list[Columns] = []
    # The runtime sees an empty or scalar array once, for its error message.
    for first in range(0, len(x) if x.ndim else 1, _PIECE) or (0,):
        piece, at = (x[first : first + _PIECE] if x.ndim else x), start + first
        if k is None:
            parts.append(vae.elbo(piece, seed, at)._asdict())
        else:
            parts.append({"log_likelihood": vae.log_likelihood(piece, k, seed, at)})
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    count = len(next(iter(columns.values())))
    return {"index": np.arange(count, dtype=np.uint64) + np.uint64(start), **columns}


def to_csv(columns: Columns) -> str:
    """Columns as CSV with a header. Numbers are written so that they read back bit for bit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
    return text.getvalue()


def to_json(columns: Columns) -> str:
    """Columns as a JSON list with one object an example."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2) + "\n"
