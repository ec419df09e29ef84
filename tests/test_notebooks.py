"""The notebooks run from the first cell to the last, on recipes of a very small model, and survive a lost machine."""

import os
import re
import shutil
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from readme import README, ROOT

from nanophi.core.files import read_json
from nanophi.core.recipe_file import RECIPES

nbformat = pytest.importorskip("nbformat")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {
    "quality": {"scorer": "column:score", "threshold": 0.5},
    "tokenizer": {"vocab_size": 400},
    "model": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 400},
    "training": {"steps": 8, "batch_size": 4, "warmup_steps": 2, "save_steps": 4, "keep_steps": [4], "eval_steps": 4}
    | {"logging_steps": 2, "precision": "fp32"},
    "evaluation": {"suites": ["heldout"], "limit": 4},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the names of the notebooks' recipes are those of a very small model on text that is there."""
    texts = [text[start : start + 2000] for text in topics.values() for start in range(0, len(text), 2000)][:150]
    pq.write_table(pa.table({"text": texts, "score": [0.9, 0.2] * (len(texts) // 2)}), tmp_path / "a.parquet")
    data = {"sources": [{"files": str(tmp_path / "a.parquet")}], "heldout_fraction": 0.1, "workers": 1}
    for name in ("demo", "demo-control", "nano-phi-115m"):
        base = yaml.safe_load((RECIPES / "demo.yaml").read_text())
        recipe = {**base, **SMALL, "name": name, "data": data, "card": {**base["card"], "prompt": "The"}}
        recipe["training"] = {**base["training"], **SMALL["training"]}
        if name == "demo-control":
            recipe["quality"] = {**SMALL["quality"], "threshold": None}
        (tmp_path / name).write_text(yaml.safe_dump(recipe))
    return tmp_path


def commands(path: Path) -> list[str]:
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    return [line[1:] for cell in cells for line in cell.source.splitlines() if line.startswith("!")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_commands_of_the_readme_and_no_output(path):
    told = README.replace(" --jobs 2", "")
    for line in commands(path):
        assert (line if path.stem == "quickstart" else " ".join(line.split()[:2])) in told
    for cell in nbformat.read(path, 4).cells:
        assert not cell.get("outputs") and not re.search(r"hf_\w{20}", cell.source)
    assert len(NOTEBOOKS) == 2


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end_twice_on_two_machines(path, folder, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pip = {"PIP_DRY_RUN": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # 0: without
    path_of_commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # an environment not activated
    for name, value in {**pip, "HF_HUB_OFFLINE": "1", "PATH": path_of_commands}.items():
        monkeypatch.setenv(name, value)
    (folder / "nanophi").symlink_to(ROOT)
    weights = []
    for machine in range(2):
        notebook = nbformat.read(path, 4)
        where = {"metadata": {"path": str(folder)}}
        nbclient.NotebookClient(notebook, timeout=900, allow_errors=True, resources=where).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        printed = "".join(output.get("text", "") for output in outputs)
        assert "nanophi: " not in printed, printed  # no command ended with an error
        assert not [output for output in outputs if output.output_type == "error"], printed
        assert ("fetched from mirror/" in printed) == bool(machine)
        assert "release: runs/" in printed
        rich = [kind for output in outputs for kind in output.get("data", {})]
        assert "text/html" in rich and ("image/png" in rich) == (path.stem == "quickstart")
        name = "demo" if path.stem == "quickstart" else "nano-phi-115m"
        weights.append(read_json(folder / f"runs/{name}/training.json")["summary"]["weights_sha256"])
        shutil.rmtree(folder / "runs")
    assert weights[0] == weights[1]
