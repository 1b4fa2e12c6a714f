"""The passes of the registry: what all of them promise, and how a choice of them is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from nets import ROUNDED, Net, applied, check_structure, close, feeds, ran, rewritten
from onnx import TensorProto, helper

from vae_export import graph
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import GRAPHS
from vae_export.errors import InputError
from vae_export.graph import rewrites
from vae_export.graph.rewrites import PASSES, optimize, select


def test_a_value_that_an_inner_graph_uses_stays() -> None:
    net = Net(("batch", 2, 5, 5))
    mid = net.add("Conv", "x", net.constant(2, 2, 3, 3), net.constant(2))
    branches = [
        helper.make_graph(
            [helper.make_node("Mul", [mid, name], [f"out_{name}"])], name, [],
            [helper.make_tensor_value_info(f"out_{name}", TensorProto.FLOAT, None)],
        )
        for name in (net.constant(1), net.constant(2, 1, 1))
    ]  # fmt: skip
    net.inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    net.add("If", "flag", then_branch=branches[0], else_branch=branches[1])
    raw = net.raw()
    for name in PASSES:
        after, counts = applied(raw, name)
        check_structure(raw, after, counts, (name,))
        feed = feeds(raw, np.float32) | {"flag": np.array(True)}
        close(ran(after, feed), ran(raw, feed), ROUNDED)


def test_integers_stay() -> None:
    net = Net(())
    net.inputs = [helper.make_tensor_value_info("x", TensorProto.INT32, ["batch", 3])]
    net.add("Mul", net.add("MatMul", "x", net.array(np.ones((3, 2), np.int32))), net.array(np.int32([2])))
    net.add("Cast", to=TensorProto.FLOAT)
    raw = net.raw()
    assert applied(raw, *PASSES) == (rewritten(raw), dict.fromkeys(PASSES, 0))


# The zoos.


def parts(bundle: Path) -> Iterator[bytes]:
    opened = Bundle(bundle)
    for part in GRAPHS:
        yield opened.read(opened.manifest.graphs[part].file)


SIZES = {"height": 16, "width": 24} | {f"{n}/{d}": s // d for n, s in (("height", 16), ("width", 24)) for d in (2, 4)}


# One of each kind of block: the other members have the same ones, and an export of each takes a while.
@pytest.mark.parametrize("name", [*zoo.MEMBERS, "kl-sdxl", "kl-flux", "tiny"])
def test_the_zoos(member: Callable[[str], Any], exported: Callable[[str], Any], name: str) -> None:
    """Each pass alone and all together, with ONNX Runtime."""
    bundle = member(name).bundle if name in zoo.MEMBERS else exported(name)[0]
    for raw in parts(bundle):
        feed = feeds(raw, np.float32, **SIZES)
        expected = ran(raw, feed)
        for names in (*((name,) for name in PASSES), tuple(PASSES)):
            after, counts = applied(raw, *names)
            check_structure(raw, after, counts, names)
            if any(counts.values()):
                close(ran(after, feed), expected, ROUNDED)


#: Changes by pass that exports are known to have, of encoder and decoder.
FOUND = {
    "resnet": {"channel_norm": (10, 10), "upsampling": (0, 1)},
    "kl-sd15": {"channel_norm": (10, 14), "upsampling": (0, 1)},
    "tiny": {"upsampling": (0, 2), "phases": (0, 2)},
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_found(member: Callable[[str], Any], exported: Callable[[str], Any], name: str) -> None:
    bundle = member(name).bundle if name in zoo.MEMBERS else exported(name)[0]
    counts = [applied(raw, *PASSES)[1] for raw in parts(bundle)]
    for found, expected in FOUND[name].items():
        assert tuple(count[found] for count in counts) == expected


# The choice.

ALL = tuple(PASSES)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (None, ALL),
        ("all", ALL),
        ("none", ()),
        ("phases, fold", ("fold", "phases")),
        ("all,-fold", tuple(name for name in ALL if name != "fold")),
        ("-fold", tuple(name for name in ALL if name != "fold")),
        ("-fold,-phases,fold", tuple(name for name in ALL if name != "phases")),
        ("none,winograd", ("winograd",)),
    ],
)
def test_choices(text: str | None, chosen: tuple[str, ...]) -> None:
    assert select(text) == chosen


@pytest.mark.parametrize(
    ("text", "name"),
    # The last two are passes of version 0.5.0.
    [("folds", "folds"), ("all,-folds", "folds"), ("", ""), ("fold,", ""), ("-batch_norm", "batch_norm"),
     ("fold,group_norm", "group_norm")],
)  # fmt: skip
def test_an_unknown_pass(text: str, name: str) -> None:
    expected = (
        f"graph passes: there is none called '{name}'; expected all, none, or, with commas between and a - before "
        f"those to leave out, some of {', '.join(ALL)}"
    )
    with pytest.raises(InputError) as error:
        select(text)
    assert str(error.value) == expected


def test_records_of_version_0_5_0_name_other_passes() -> None:
    """A rebuild from such a record runs those that there are."""
    net = Net(("batch", 3))
    net.add("Relu")
    names = ("upsampling", "phases", "winograd", "fold", "group_norm", "channel_norm", "batch_norm", "scaling")
    assert list(optimize(graph.read(net.raw()), names)) == [name for name in PASSES if name in names]


def test_every_pass_has_a_summary() -> None:
    for name, one in PASSES.items():
        assert one.name == name
        assert re.fullmatch(r"[A-Z].{20,110}\.", one.summary)


def test_a_pass_is_one_file_and_one_line() -> None:
    """Every file is registered, and nothing else is."""
    files = {path.stem for path in Path(rewrites.__file__).parent.glob("*.py")}
    assert files - {"__init__"} == set(rewrites.ALWAYS) | set(rewrites.FORMS)
