"""Parts run once each, on any number of processes, and say so when one fails."""

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_parts import die_on_three, fail_on_three, square  # type: ignore[import-not-found]

from nanophi.records import UserError
from nanophi.training.engine import run_parts


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="needs Ray")
    # Its workers import the functions of this file by name, as a cluster's machines import nanophi's.
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield ray
    ray.shutdown()


def test_ray_gives_the_same_and_fails_alike(tmp_path: Path, ray: Any) -> None:
    parts = [(number,) for number in range(7)]
    expected = run_parts(square, parts, tmp_path / "local", "squares", 1)
    assert run_parts(square, parts, tmp_path / "ray", "squares", 2, "ray") == expected
    for path in (tmp_path / "local").iterdir():
        assert path.read_bytes() == (tmp_path / "ray" / path.name).read_bytes()
    with pytest.raises(UserError, match="part three is bad"):
        run_parts(fail_on_three, parts, tmp_path / "failed", "squares", 2, "ray")
    with pytest.raises(UserError, match="a worker process died"):
        run_parts(die_on_three, parts, tmp_path / "died", "squares", 2, "ray")
    assert len(run_parts(square, parts, tmp_path / "died", "squares", 2, "ray")) == 7


def test_documents_and_tokens_are_the_same_on_ray(tmp_path: Path, ray: Any) -> None:
    from nanophi.training import corpus, packing, quality, tokenizer
    from nanophi.training.recipe import Data, Quality, Tokenizer

    generator = random.Random(0)
    for name in "abc":
        rows = [{"text": " ".join(f"w{generator.randrange(3000)}" for _ in range(80)), "score": 0.7} for _ in range(50)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sums = []
    for engine in ("local", "ray"):
        source = {"files": str(tmp_path / "*.jsonl")}
        data = Data.model_validate({"sources": [source], "engine": engine, "workers": 2, "heldout_fraction": 0.2})
        work, scorer = tmp_path / engine, Quality(scorer="column:score")
        documents = corpus.gather(data, work / "documents", ["score"])
        quality.score(work / "documents", scorer, data, 0, work / "scores")
        quality.select(work / "documents", work / "scores", scorer, work / "quality")
        tokenizer.build(work / "documents", Tokenizer(vocab_size=300), 0, work / "tokenizer")
        folders = (work / "documents", work / "quality", work / "tokenizer")
        sums.append((documents, packing.pack(*folders, 64, data, 0, work / "tokens")))
    assert sums[0] == sums[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_keep_the_order_of_the_parts(tmp_path: Path, workers: int) -> None:
    results = run_parts(square, [(number,) for number in range(7)], tmp_path, "squares", workers)
    assert results == [{"square": number**2} for number in range(7)]
    assert (tmp_path / "00006.txt").read_text() == "6"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_is_raised_and_what_was_finished_stays(tmp_path: Path, workers: int) -> None:
    parts = [(number,) for number in range(5)]
    with pytest.raises(UserError, match="part three is bad"):
        run_parts(fail_on_three, parts, tmp_path, "squares", workers)
    assert not (tmp_path / "00003.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert finished
    assert len(run_parts(square, parts, tmp_path, "squares", workers)) == 5
    assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items())


def test_a_worker_that_is_killed_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a worker process died"):
        run_parts(die_on_three, [(number,) for number in range(5)], tmp_path, "squares", 2)
    assert not (tmp_path / "00003.json").exists()


def test_no_parts(tmp_path: Path) -> None:
    assert run_parts(square, [], tmp_path, "nothing", 2) == []
