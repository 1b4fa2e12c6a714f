"""The runners of a bundle that this machine has, and why the others are absent."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_export.bench import peers as others
from vae_export.bench.report import Absent, first_line
from vae_export.bench.runners import Bare, Ours, Recipe, Runner
from vae_export.contract.bundle import Bundle
from vae_export.errors import BackendError, InputError, require
from vae_export.runtimes.threads import cores

if TYPE_CHECKING:
    from vae_export.sources.protocol import Trained

Opener = Callable[[Recipe, Any], Runner]

#: How to open a recipe of each kind. Those of PyTorch need the resolved source.
KINDS: Mapping[str, Opener] = {
    "ours": lambda recipe, trained: Ours(recipe.bundle, build=recipe.build, threads=recipe.threads, own=recipe.own),
    "onnxruntime": lambda recipe, trained: Bare(recipe.bundle, threads=recipe.threads),
    "openvino-fp32": lambda recipe, trained: others.OpenVino(recipe.bundle, threads=recipe.threads),
    "openvino-bf16": lambda recipe, trained: others.OpenVino(recipe.bundle, precision="bf16", threads=recipe.threads),
    "eager": lambda recipe, trained: others.Eager(trained, threads=recipe.threads),
    "compile": lambda recipe, trained: others.Compiled(trained, threads=recipe.threads),
    "diffusers": lambda recipe, trained: others.Diffusers(trained, threads=recipe.threads),
}
#: The kinds of other software, and their names in reports where they are absent.
PEERS: Mapping[str, str] = {
    "eager": "PyTorch eager",
    "compile": "torch.compile",
    "diffusers": "diffusers",
    "openvino-fp32": "OpenVINO f32",
    "openvino-bf16": "OpenVINO bf16",
}
_OF_SOURCE = ("eager", "compile", "diffusers")


@dataclass
class Selection(AbstractContextManager["Selection"]):
    """Open runners of a bundle, as a context that closes them.

    Attributes:
        bundle: its folder.
        threads: of every call.
        runners: ours first.
        absent: the requested ones that this machine does not have.
        opened: the seconds that opening each took, by name.
    """

    bundle: str | Path
    threads: int
    runners: list[Runner] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    opened: dict[str, float] = field(default_factory=dict)

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all runners, the last opened first."""
        while self.runners:
            self.runners.pop().close()


def candidates(
    bundle: str | Path,
    *,
    builds: Sequence[str | Path] = (),
    source: Any = None,
    peers: Collection[str] = (),
    threads: int | None = None,
    own: bool = False,
) -> Selection:
    """Open our runtime, a bare session of ONNX Runtime, and peers.

    Args:
        bundle: its folder.
        builds: folders of builds of it to open; without any, `load` chooses on the CPU in float32.
        source: what the bundle was exported from, as for `sources.resolve`: peers that run PyTorch need it.
        peers: kinds of `PEERS` to open as well.
        threads: of every call of every runner; None takes one for each core that this process may use.
        own: without builds, open the bundle's own graphs and no build of the cache.

    Raises:
        InputError: threads is below 1, there is a source without peers, or as for `load`.
        BundleError, BackendError: as for `load`, and for reading the source.
    """
    if threads is not None and threads < 1:
        raise InputError(f"bench: threads is {threads}; expected a number from 1 on")
    if source is not None and not peers:
        raise InputError("bench: --source is for timing PyTorch, which is a peer, and no peers are timed. Add --peers")
    selection = Selection(bundle, threads or cores())
    shared = Recipe("ours", str(bundle), selection.threads, source=source)
    try:
        for build in builds or (None,):
            recipe = replace(shared, build=None if build is None else str(build), source=None, own=own)
            _open(selection, recipe, None)
        _distinguish(selection)
        _open(selection, replace(shared, kind="onnxruntime", source=None), None)
        if peers:
            _open_peers(selection, shared, peers)
    except BaseException:
        selection.close()
        raise
    return selection


def open_recipe(recipe: Recipe) -> Runner:
    """Open one runner, its source included. Errors: as for `candidates`."""
    return KINDS[recipe.kind](recipe, _resolved(recipe.source) if recipe.kind in _OF_SOURCE else None)


def _open_peers(selection: Selection, shared: Recipe, kinds: Collection[str]) -> None:
    trained = None if shared.source is None else _resolved(shared.source)
    origin = trained.origin if trained else Bundle(shared.bundle).manifest.origin
    for kind, name in PEERS.items():
        if kind not in kinds or (kind == "diffusers" and origin.kind != "diffusers"):
            continue
        if kind in _OF_SOURCE and trained is None:
            why = "it needs the source that the bundle was exported from. Pass it with --source"
            selection.absent.append(Absent(name, why))
            continue
        try:
            recipe = replace(shared, kind=kind, source=shared.source if kind in _OF_SOURCE else None)
            _open(selection, recipe, trained)
        except BackendError as error:
            selection.absent.append(Absent(name, first_line(error)))


def _open(selection: Selection, recipe: Recipe, trained: Trained | None) -> None:
    began = time.perf_counter()
    runner = KINDS[recipe.kind](recipe, trained)
    runner.recipe = recipe
    selection.runners.append(runner)
    selection.opened[runner.name] = time.perf_counter() - began


def _distinguish(selection: Selection) -> None:
    """Add the folder to the names of builds of the same precision."""
    counted = Counter(runner.name for runner in selection.runners)
    taken: set[str] = set()
    opened = list(selection.opened.values())
    for runner in selection.runners:
        if counted[runner.name] > 1 and runner.recipe and runner.recipe.build:
            runner.name = f"{runner.name} ({runner.recipe.build})"
        if runner.name in taken:
            raise InputError(f"bench: {runner.name} is given twice. Name each build once")
        taken.add(runner.name)
    selection.opened = dict(zip((runner.name for runner in selection.runners), opened, strict=False))


def _resolved(source: Any) -> Trained:
    require("torch", "export", "bench --source")
    from vae_export import sources

    return sources.resolve(source)
