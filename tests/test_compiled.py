"""Laws of compiled encoders: out of memory is survived, each is compiled, and what runs uncompiled is said."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from processes import run_process


def in_a_process(folder: Path, *what: str) -> dict[str, Any]:
    done = run_process("compiled_encoders", folder, *what, timeout=None)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_a_process(tmp_path_factory.mktemp("compiled"), "instances", "out_of_memory")


def check_that_it_shrinks(found: dict[str, Any]) -> None:
    assert (found["chunk"], found["split"]) == (8, 8)
    looked = found["looked"][found["looked"].index(64) :]  # a trial of the time to come is before it
    assert [rows for rows, _ in groupby(looked)][:4] == [64, 32, 16, 8]
    assert max(looked[looked.index(8) :]) == 8
    assert [rows for rows, _ in groupby(found["learned"])] == [64, 32, 16, 8]


def test_where_memory_runs_out_a_compiled_encoder_takes_fewer_patches_until_they_fit(found: dict[str, Any]) -> None:
    check_that_it_shrinks(found["out_of_memory"])


@pytest.mark.cuda(dry=False)
def test_where_the_memory_of_a_gpu_runs_out_too(tmp_path: Path) -> None:
    check_that_it_shrinks(in_a_process(tmp_path, "out_of_memory")["out_of_memory"])
    assert "computing on cuda" in (tmp_path / "run" / "log.txt").read_text()


def test_every_encoder_of_a_process_is_compiled_into_one_graph_or_this_is_said(found: dict[str, Any]) -> None:
    found = found["instances"]
    assert found["breaks"] == []
    assert found["written_over"] == [], "torch before 2.14 breaks the graph there"
    assert found["warnings"] == []
    assert found["graphs"] == [4] * 9 + [0] * 2, "looking and learning, twice each; the last two are like others"
    assert found["apart"] < 1e-5
    assert len(found["past the limit"]) == 1
    assert "uncompiled" in found["past the limit"][0]
