"""Model cards as readers use them: their snippets are run, and their tables are read as Markdown reads them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vae_export
from vae_export.contract.model import SizeDim


def check(bundle: Path) -> str:
    """Run every snippet of a bundle's card beside the bundle, and check its tables and pictures; the card."""
    card = (bundle / "README.md").read_text(encoding="utf-8")
    model = vae_export.Bundle(bundle).manifest.model
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippets
    for snippet in snippets:
        names: dict[str, object] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(bundle.parent)
            exec(compile(snippet, "README.md", "exec"), names)
        x = names["again" if "again" in names else "x"]
        assert isinstance(x, np.ndarray)
        dims = zip(model.data.shape, x.shape[1:], strict=True)
        assert all(isinstance(dim, SizeDim) or dim == length for dim, length in dims)
        assert np.isfinite(x).all()
        names["vae"].close()
    for table in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        cells = {len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(cells) == 1, table
    for file in re.findall(r"!\[.*?\]\((.*?)\)", card):
        with Image.open(bundle / file) as picture:
            assert np.asarray(picture).std() > 1
    return card
