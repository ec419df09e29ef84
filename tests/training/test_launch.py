"""Launching: what is planned, asked, submitted and followed, with the real client and a loopback Jobs API."""

import importlib.metadata
import io
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hub_server import TOKEN, HubServer
from test_architecture import PACKAGE, modules

from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.core.recipe import load_recipe
from nanophi.training import launch as module
from nanophi.training.budget import DEVICES
from nanophi.training.estimate import predict
from nanophi.training.launch import launch, wheel

URL = "memory://bucket/runs"
BUDGET = {"mirror": URL, "max_dollars": 15.0}
RECIPE = Path("nano-phi-115m")


@pytest.fixture
def hub(hub, monkeypatch):
    monkeypatch.setattr(fsspec.filesystem("memory"), "store", {})
    return hub


def test_a_job_is_planned_submitted_and_followed(hub, monkeypatch, capsys):
    monkeypatch.setenv("TRACKER_KEY", "key-of-a-tracker\nits-second-line")
    hub.answer = ["step 1", f"a line with {TOKEN} and key-of-a-tracker", "its-second-line", "done\x1b[2J"]
    launch([RECIPE], secret=["TRACKER_KEY"], yes=True, **BUDGET)
    (job,) = hub.jobs.values()
    out = capsys.readouterr().out
    assert job["flavor"] == "h200" and job["timeoutSeconds"] == pytest.approx(3 * 3600, abs=5)  # $15 at $5 an hour
    assert job["dockerImage"] == f"python:{sys.version_info[0]}.{sys.version_info[1]}"
    assert job["secrets"] == {"HF_TOKEN": TOKEN, "TRACKER_KEY": "key-of-a-tracker\nits-second-line"}
    told = str({key: value for key, value in job.items() if key not in ("secrets", "log")})
    for value in job["secrets"].values():
        assert not [line for line in value.splitlines() if line in told + out]
    known = predict(load_recipe(RECIPE), DEVICES["h200"])
    assert f"and ${known['hours'] * 5:.2f} for the training, at 40 % of the peak" in out
    assert "flavor:   h200 (Nvidia H200), $5.00 an hour" in out
    assert f"command:  nanophi run ./nano-phi-115m.yaml --mirror {URL}\n" in out
    assert "limit:    3 h 00 min and $15.00, then resumable" in out
    assert "secrets:  HF_TOKEN, TRACKER_KEY" in out
    assert out.endswith("step 1\na line with *** and ***\n***\ndone\\x1b[2J\n")
    script = job["command"][2]
    assert "left=$((10200 - SECONDS))\n" in script or "left=$((10199 - SECONDS))\n" in script  # ten minutes before
    assert (
        "timeout --foreground --signal=TERM $((left > 1 ? left : 1)) python -m nanophi run ./nano-phi-115m.yaml"
        in script
    )
    kit = {path.rpartition("/")[2]: path for path in fsspec.filesystem("memory").find("/bucket/runs/launch")}
    assert set(kit) == {"nanophi-0.2.0-py3-none-any.whl", "constraints.txt", "nano-phi-115m.yaml"}
    assert all(name in script for name in kit)
    dumped = yaml.safe_load(fsspec.filesystem("memory").cat_file(kit["nano-phi-115m.yaml"]))
    assert dumped == load_recipe(RECIPE).dump()


def test_nothing_is_submitted_or_copied_without_consent(hub, monkeypatch, capsys):
    for asked, answer in ((False, True), (True, False)):
        monkeypatch.setattr(sys.stdin, "isatty", lambda asked=asked: asked, raising=False)
        monkeypatch.setattr(module.typer, "confirm", lambda question, answer=answer: answer)
        with pytest.raises(UserError, match="nothing was submitted; answer yes, or add --yes"):
            launch([RECIPE], **BUDGET)
        assert "limit:    3 h 00 min and $15.00" in capsys.readouterr().out
    assert not hub.jobs and not fsspec.filesystem("memory").store
    monkeypatch.setattr(module.typer, "confirm", lambda question: True)
    launch([RECIPE], **BUDGET)
    assert len(hub.jobs) == 1


def test_a_job_is_left_and_followed_again(hub, monkeypatch, capsys):
    from huggingface_hub import HfApi

    launch([RECIPE], yes=True, **BUDGET)
    (number,) = hub.jobs

    def interrupted(self, **options):
        yield "step 1"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "fetch_job_logs", interrupted)
        launch(follow=number)
    assert capsys.readouterr().out.endswith(f"to follow it again: nanophi launch --follow {number}\n")
    hub.jobs[number].update(log=["step 2", "stopped by SIGTERM after saving step 2"], stage="ERROR")
    with pytest.raises(UserError, match=rf"job {number} ended early \(ERROR\); launch it again to continue"):
        launch(follow=number)
    assert capsys.readouterr().out == "step 2\nstopped by SIGTERM after saving step 2\n"
    with pytest.raises(UserError, match="job 0123 cannot be followed"):
        launch(follow="0123")


def test_several_recipes_share_the_gpus_of_a_machine(hub, capsys):
    launch([RECIPE, Path("nano-phi-115m-control")], flavor="a100x4", yes=True, **BUDGET)
    (job,) = hub.jobs.values()
    assert "./nano-phi-115m.yaml ./nano-phi-115m-control.yaml" in job["command"][2]
    assert "--jobs 2" in job["command"][2]
    assert "estimate: " in capsys.readouterr().out


def test_what_cannot_be_launched_is_refused_before_anything(hub, tmp_path):
    own = tmp_path / "own.yaml"
    values = {"extends": "nano-phi-115m", "name": "own", "quality": {"scorer": "none", "threshold": None}}
    own.write_text(yaml.safe_dump({**values, "data": {"sources": [{"files": "a/*.txt"}]}}))
    for arguments, why in (
        ({"recipes": [RECIPE], "mirror": URL}, "and --max-dollars"),
        ({"recipes": [RECIPE], "mirror": str(tmp_path), "max_dollars": 1.0}, "the URL of one that the job reaches"),
        ({"recipes": [], **BUDGET}, "name a RECIPE"),
        ({"recipes": [RECIPE], "flavor": "h20", **BUDGET}, "--flavor h20 is unknown; did you mean 'h200'"),
        ({"recipes": [own], **BUDGET}, r"own: the job cannot read .*a/\*\.txt; put it on the Hub"),
        ({"recipes": [RECIPE, RECIPE], **BUDGET}, "two recipes have the same name"),
        ({"recipes": [RECIPE], **BUDGET, "mirror": f"file://{tmp_path}"}, "the URL of one that the job reaches"),
        ({"recipes": [RECIPE], **BUDGET, "secret": ["TRACKR_KEY"]}, "--secret TRACKR_KEY: there is no such variable"),
        ({"recipes": [RECIPE], **BUDGET, "max_dollars": 0.01}, r"7 s of h200, at \$5.00 an hour, are too short"),
        *(
            ({"recipes": [RECIPE], **BUDGET, "overrides": [f"{key}={tmp_path}"]}, f"the job cannot read {tmp_path}")
            for key in ("tokenizer.path", "evaluation.data", "data.decontamination.benchmarks")
        ),
        ({"recipes": [RECIPE], **BUDGET, "overrides": [f"quality.scorer=model:{tmp_path}"]}, "the job cannot read"),
    ):
        with pytest.raises(UserError, match=why):
            launch(**arguments, yes=True)
    hub.fail("POST /api/jobs/", 402)
    with pytest.raises(UserError, match=r"the job was not submitted .*402"):
        launch([RECIPE], yes=True, **BUDGET)
    assert not hub.jobs


def test_a_job_installs_what_its_recipes_need(hub, tmp_path):
    changes = ["training.track_energy=true", "training.country_iso_code=FRA", "training.report_to=[trackio]"]
    launch([RECIPE], yes=True, overrides=changes, **BUDGET)
    (job,) = hub.jobs.values()
    assert "--constraint constraints.txt './nanophi-0.2.0-py3-none-any.whl[energy]' trackio\n" in job["command"][2]


def test_versions_are_those_that_are_imported(tmp_path, monkeypatch):
    for name, version in (("numpy", "1.2.0"), ("Some.Package", "3.0+cpu"), ("some_package", "2.0"), ("~umpy", "")):
        (folder := tmp_path / version / f"{name}-{version}.dist-info").mkdir(parents=True)
        if version:
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setattr(
        sys, "path", [*sys.path, *(str(tmp_path / version) for version in ("1.2.0", "3.0+cpu", "2.0", ""))]
    )
    lines = module._kit(tmp_path, [])["constraints.txt"].read_text().splitlines()
    assert "some-package==3.0" in lines and len({line.partition("==")[0] for line in lines}) == len(lines)
    assert f"numpy=={importlib.metadata.version('numpy')}" in lines


def test_an_interrupted_local_job_is_told_once_and_waited_for(tmp_path, monkeypatch):
    script = """
trap 'echo told >> {0}; sleep 0.3; echo saved >> {0}; exit 3' TERM
echo started >> {0}
sleep 0.5
kill -TERM $PPID
sleep 60 & wait $!"""
    log = tmp_path / "log"
    monkeypatch.setattr(
        module.venv,
        "create",
        lambda path: (path / "lib" / f"python{module.PYTHON}" / "site-packages").mkdir(parents=True),
    )
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            module._run_here(script.format(log))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert log.read_text().split() == ["started", "told", "saved"]


def test_the_wheel_holds_the_package_and_is_the_same_each_time(tmp_path, monkeypatch):
    (tmp_path / "again").mkdir()
    path = wheel(tmp_path)
    assert path.read_bytes() == wheel(tmp_path / "again").read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        metadata = archive.read("nanophi-0.2.0.dist-info/METADATA").decode()
    files = {f"nanophi/{file.relative_to(PACKAGE).as_posix()}" for file in modules().values()}
    files |= {f"nanophi/recipes/{file.name}" for file in (PACKAGE / "recipes").glob("*.yaml")}
    files |= {"nanophi/eval/tasks.yaml", "nanophi/LICENSE", "nanophi/eval/tasks/heldout_order.yaml"}
    assert files <= names
    assert not [name for name in names if "/tests/" in name or "__pycache__" in name or "benchmarks" in name]
    (room := tmp_path / "clone" / "data").mkdir(parents=True)
    for name in ("../__init__.py", "../LICENSE", "__init__.py", "corpus", "a.jsonl", ".env", "a.safetensors"):
        (room / name).write_text("")
    monkeypatch.setattr(module.nanophi, "__file__", str(tmp_path / "clone/__init__.py"))
    with zipfile.ZipFile(wheel(tmp_path)) as archive:
        own = {name for name in archive.namelist() if "dist-info" not in name}
    assert own == {"nanophi/__init__.py", "nanophi/LICENSE", "nanophi/data/__init__.py"}
    assert "Requires-Dist: torch" in metadata


JOB = """
extends: {demo}
name: demo
data: {{sources: [{{hub: org/texts, split: train, name: texts}}], workers: 1, heldout_fraction: 0.1}}
quality: {{scorer: none, threshold: null}}
evaluation: {{suites: [heldout], limit: 4}}
"""


@pytest.mark.slow
def test_a_local_job_that_is_cut_twice_is_continued_and_finished(tmp_path):
    """The demo's model and training on other text, in fresh environments and empty folders, as a job would run it."""
    (tmp_path / "demo.yaml").write_text(JOB.format(demo=PACKAGE / "recipes/demo.yaml"))
    (tmp_path / "mirror").mkdir()
    texts = [text[start : start + 2000] for text in topics.values() for start in range(0, len(text), 2000)]
    rows = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), rows)
    command = [sys.executable, "-m", "nanophi", "launch", "demo.yaml", "--on", "local", "--mirror", "mirror", "--yes"]
    reached, printed = [], []
    with HubServer() as server:
        server.add_repository("dataset", "org/texts", {"data/train-00000-of-00001.parquet": rows.getvalue()})
        environment = {**os.environ, **server.environment(tmp_path / "home")}
        for minutes in (1, 1, 60):
            line = [*command, "--max-hours", str(minutes / 60)]
            done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
            printed.append(done.stdout + done.stderr)
            assert done.returncode == (minutes == 1), printed[-1]
            if manifests := list(tmp_path.glob("mirror/demo/manifests/*.json")):
                reached.append(read_json(manifests[0])["reached"])
            assert not list(tmp_path.glob("mirror/demo/lease"))
    assert all("its time is over" in text and "launch it again to continue" in text for text in printed[:2])
    assert f"fetched from {tmp_path}/mirror/demo" in printed[2]
    assert reached == sorted(reached) and reached[-1][0] == 600
    assert "release: runs/demo/release" in printed[2]
    assert TOKEN not in "".join(printed)
