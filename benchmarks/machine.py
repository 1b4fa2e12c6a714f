"""The machine and the versions that a result was measured with."""

from __future__ import annotations

from vae_export.bench import machine

__all__ = ["machine"]
