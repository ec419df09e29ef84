"""What would stop a run after hours is refused before it begins."""

from pathlib import Path

import pytest

from nanophi.core.errors import UserError
from nanophi.core.recipe import load_recipe
from nanophi.data.stages import PREPARE
from nanophi.pipeline import Pipeline

RECIPE = """
name: small
data:
  sources: [{files: "@/a.jsonl"}]
  heldout_fraction: 0.2
  workers: 1
quality: {scorer: "column:score"}
tokenizer: {vocab_size: 300}
model:
  {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 8, max_position_embeddings: 256}
training: {steps: 2, batch_size: 2, learning_rate: 0.01}
evaluation: {suites: [heldout]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = (f"Document {n} about {' '.join(str(n * m) for m in range(40))}" for n in range(40))
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "{text}", "score": 0.9}}' for text in texts))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("@", str(tmp_path)))
    return tmp_path


def pipeline(folder: Path, *overrides: str) -> Pipeline:
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    return Pipeline(recipe, folder / "runs", report=lambda line: None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.data=nowhere/at/all"], "small: evaluation.data: folder nowhere/at/all does not exist"),
        (
            ["evaluation.suites=[heldout, 'arc_easy,sciq']", "evaluation.data=."],
            r"small: evaluation.data: task 'arc_easy' needs the dataset allenai/ai2_arc, which is not in \.",
        ),
        (["base=nowhere"], "base: folder nowhere does not exist"),
        (["training.arguments={nonsense: 1}"], "training.arguments: 'nonsense' is unknown"),
    ],
)
def test_before_anything_is_made(folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(folder, *overrides).check("verification")
    assert not (folder / "runs").exists()


def test_held_out_tasks_need_no_folder_of_benchmarks_but_documents_before_the_training(folder: Path) -> None:
    pipeline(folder, f"evaluation.data={folder}").check("verification")
    message = r"evaluation.suites: heldout_continuation: too few documents of 600 characters"
    with pytest.raises(UserError, match=message):
        pipeline(folder).make("training")
    assert not (folder / "runs/small/checkpoints").exists()


def test_a_restart_that_cannot_begin_removes_nothing(folder: Path) -> None:
    def train(*overrides: str, restart: bool = False) -> None:
        recipe = load_recipe(folder / "recipe.yaml", overrides)
        Pipeline(recipe, folder / "runs", (*PREPARE, "training"), lambda line: None, restart).make("training")

    for name in ("base", "small"):
        train(f"name={name}")
    weights = folder / "runs/small/checkpoints/step-000002/model.safetensors"
    base = weights.parents[3] / "base/checkpoints/step-000002"
    with pytest.raises(UserError, match="hidden_size"):
        train(f"base={base}", "model.hidden_size=64", restart=True)
    assert weights.is_file()
    (base / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="base"):
        train(f"base={base}", "training.learning_rate=0.02", restart=True)
    assert weights.is_file()
    train("training.learning_rate=0.02", restart=True)


@pytest.mark.parametrize("override", ["tokenizer.path=nowhere/at/all", "quality.scorer=model:nowhere/at/all"])
def test_a_name_that_is_nothing_before_the_documents_are_read_again(folder: Path, override: str) -> None:
    pipeline(folder).tokens()
    (folder / "a.jsonl").write_text((folder / "a.jsonl").read_text() + "\n" + '{"text": "One more.", "score": 1}')
    lines: list[str] = []
    changed = Pipeline(load_recipe(folder / "recipe.yaml", [override]), folder / "runs", report=lines.append)
    with pytest.raises(UserError, match="nowhere/at/all: no such file or folder"):
        changed.tokens()
    assert not lines
