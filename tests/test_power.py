"""The certificate's power: planted faults fail, and right exports pass by a margin. All cases: `make margins`."""

from __future__ import annotations

import faults
import margins
import odd
import pytest
import zoo_diffusers

from vae_export.graph import read

MODELS = ("every-8", "every-10")


@pytest.fixture(scope="module")
def cases() -> dict[str, margins.Case]:
    return {name: margins.prepare(odd.everything(name)) for name in MODELS}


@pytest.mark.parametrize("runner", sorted(margins.RUNNERS))
@pytest.mark.parametrize("name", MODELS)
def test_right_exports(cases: dict[str, margins.Case], name: str, runner: str) -> None:
    case = cases[name]
    margin = margins.measure(case, margins.RUNNERS[runner](case))
    assert margin.share <= margins.RIGHT, margin.check


@pytest.mark.parametrize("kind", sorted(faults.FAULTS))
@pytest.mark.parametrize("name", MODELS)
def test_faults_are_refused(cases: dict[str, margins.Case], name: str, kind: str) -> None:
    found = dict(margins.planted(cases[name], kind))
    assert "encoder" in found, "there is a place for every kind"
    for graph, margin in found.items():
        assert margin is not None, f"{graph}: nothing changed"
        assert margin.share >= margins.WRONG, f"{graph}: {margin.check}"


def test_a_fault_is_planted_once(cases: dict[str, margins.Case]) -> None:
    """Each changes the graph that it names and no other; graphs without a place for it are left out."""
    graphs = cases["every-8"].graphs
    for kind in faults.FAULTS:
        for name, wrong in faults.plant(graphs, kind).items():
            assert [key for key in graphs if wrong[key] != graphs[key]] == [name]
            assert [v.name for v in read(wrong[name]).graph.outputs] == [
                v.name for v in read(graphs[name]).graph.outputs
            ]


def test_odd_configurations_are_drawn_alike() -> None:
    assert len(odd.CONFIGS) == 48
    assert odd._draw() == odd.CONFIGS
    assert len({str(config) for config in odd.CONFIGS.values()}) == 48
    assert zoo_diffusers.ALL.keys() >= odd.CONFIGS.keys()
