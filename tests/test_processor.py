"""What is known of the processor, and of the one that a build was measured on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from vae_export.contract import build_record
from vae_export.runtimes import processor

ZEN4 = frozenset({"avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "bmi2", "gfni", "vaes"})


def test_this_one() -> None:
    found = processor.processor()
    assert found.model.isprintable()
    assert found.model
    assert found.architecture == {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    assert found.features == tuple(sorted(processor.features()))
    assert 1 <= found.cores <= found.threads <= 4096
    assert str(found).startswith(f"{found.model} ({found.architecture}, {found.cores} core")
    assert msgspec.json.decode(msgspec.json.encode(found), type=build_record.Processor) == found


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux has /proc/cpuinfo")
def test_what_linux_says_is_there() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    names = {"avx2", "fma", "avx512_vnni", "avx_vnni", "asimddp"} & flags
    assert names <= processor.features()
    assert ("vnni" in processor.features()) == bool({"avx512_vnni", "avx_vnni", "asimddp"} & flags)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_only_what_the_process_may_use_is_counted() -> None:
    program = (
        "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from vae_export.runtimes import processor\nfound = processor.processor()\nprint(found.cores, found.threads)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "1 1\n"


def test_what_the_processor_denies_is_not_believed() -> None:
    """Under an emulator of an AVX2 processor, Linux tells of the AVX-512 machine below."""
    asked = {**dict.fromkeys(("avx2", "fma", "bmi2"), True), **dict.fromkeys(("avx512f", "gfni", "vaes"), False)}
    assert processor.combined(ZEN4, asked) == {"avx2", "fma"}
    # An emulated processor without AVX-512 on a machine without it, which has VNNI all the same.
    alder_lake = frozenset({"avx2", "fma", "avx_vnni", "bmi2", "gfni", "vaes"})
    assert processor.combined(alder_lake, asked) == {"avx2", "fma"}
    asked |= {"gfni": True, "vaes": True}
    assert processor.combined(alder_lake, asked) == {"avx2", "fma", "avx_vnni", "vnni"}


@pytest.mark.parametrize(
    ("known", "general"),
    [
        ({"avx2", "fma"}, set()),
        ({"avx512f", "avx512_vnni"}, {"vnni"}),
        ({"avx512f", "avx512_vnni", "avx512_bf16"}, {"vnni", "bf16"}),
        ({"avx2", "avx_vnni"}, {"vnni"}),
        ({"avx2", "avx_vnni", "avx_vnni_int8", "avx_ne_convert"}, {"vnni", "bf16"}),
        ({"avx2", "avx_ne_convert"}, set()),
        ({"amx_bf16"}, {"bf16"}),
        ({"asimd"}, set()),
        ({"asimd", "asimddp", "bf16"}, {"vnni", "bf16"}),
    ],
)
def test_what_holds_on_every_architecture(known: set[str], general: set[str]) -> None:
    assert processor.general(frozenset(known)) == general


@pytest.mark.skipif(
    not shutil.which("qemu-x86_64") or platform.machine() != "x86_64", reason="there is no emulator qemu-x86_64 here"
)
def test_an_emulated_processor() -> None:
    """A Haswell has AVX2 and neither AVX-512, VNNI nor bfloat16, whatever it is emulated on."""
    program = (
        "from vae_export.runtimes import processor; import sys; print(*sorted(processor.features()), file=sys.stdout)"
    )
    command = ["qemu-x86_64", "-cpu", "Haswell", os.path.realpath(sys.executable), "-c", program]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["avx", "avx2", "f16c", "fma"]


def test_a_processor_is_checked() -> None:
    for wrong, words in (
        ({"cores": 0}, "numbers from 1 on expected"),
        ({"model": "a\x1bb"}, "printable text expected"),
    ):
        with pytest.raises(ValueError, match=words):
            build_record.Processor(**{"model": "x", "architecture": "y", **wrong})
