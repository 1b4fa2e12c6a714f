"""Closed sets of names that records and the command line share.

Nothing else is imported here: `--help` lists them without loading what reads records.
"""

from __future__ import annotations

from typing import Literal

#: What the heavy nodes of a graph compute in.
Precision = Literal["fp32", "fp16", "bf16", "int8"]

#: The same as an option of a build: `auto` is the fastest of all that holds.
Asked = Literal["auto", "fp32", "fp16", "bf16", "int8"]

#: The same as an option of `load`: `tf32` is float32 whose products a GPU may round to TF32's 10 bits.
Wanted = Literal["auto", "fp32", "tf32", "fp16", "bf16", "int8"]
