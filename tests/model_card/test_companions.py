"""The scorer and the data beside a model: published by the real client, used by a stranger."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import yaml
from hub_client import is_whole, push, talk_to  # type: ignore[import-not-found]
from hub_server import HubServer  # type: ignore[import-not-found]

from nanophi.core.errors import UserError
from nanophi.core.recipe import Recipe, load_recipe
from nanophi.data import gather, packing, quality, scoring
from nanophi.data.scorers import LinearScorer, find_scorer
from nanophi.model_card import companions
from nanophi.model_card import push as pushing
from nanophi.model_card.manifest import file_problems, write_manifest

pytestmark = pytest.mark.usefixtures("no_branches")
DOCUMENTS = 60
WRITTEN = {entry.part: entry.written for entry in companions.COMPANIONS}


def write_texts(folder: Path) -> None:
    """Two sources that a scorer can tell apart."""
    generator = random.Random(1)
    words = {
        "good": "the module holds definitions which other modules import by name when they need a function",
        "bad": "click HERE buy NOW free $$$ >>> login cart (0) www win !!! 100% OFF sale",
    }
    for name, vocabulary in words.items():
        rows = [{"text": " ".join(generator.choices(vocabulary.split(), k=80))} for _ in range(DOCUMENTS)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(run: Path, texts: Path, **source: Any) -> Recipe:
    """Makes the data of a run anew, from `texts`, with its other records as they were."""
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    values["data"]["sources"] = [{"files": str(texts / f"{name}.jsonl"), **source} for name in ("good", "bad")]
    for entry, name in zip(values["data"]["sources"], ("good", "bad"), strict=True):
        entry["name"] = name
    values["data"]["deduplication"] = {"similarity": 0.9}
    values["data"]["heldout_fraction"] = 0.1
    values["quality"] |= {"high": ["good"], "low": ["bad"]}
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(run / "recipe.yaml")
    for part in ("documents", "scores", "quality"):
        shutil.rmtree(run / "data" / part)
    gather.gather(recipe.data, run / "data" / "documents")
    scoring.score(run / "data" / "documents", recipe.quality, recipe.data, 0, run / "data" / "scores")
    scoring.select(run / "data" / "documents", run / "data" / "scores", recipe.quality, run / "data" / "quality")
    return recipe


@pytest.fixture(scope="module")
def scored(built_release, tmp_path_factory):
    """A release within a run whose data, scores and selection are real."""
    folder = tmp_path_factory.mktemp("scored")
    run = Path(shutil.copytree(built_release.parent, folder / "runs" / "tiny"))
    write_texts(folder)
    prepare(run, folder, license="cc-by-4.0")
    return run / "release"


def page_of(hub: HubServer, kind: str, name: str) -> str:
    return hub.repositories[kind, name].branches["main"].files["README.md"].data.decode()


def test_a_published_scorer_is_used_at_a_revision(scored, hub, tmp_path):
    push(scored, "org/demo", scorer=True, data="scores", control="org/control")
    repository = hub.repositories["model", "org/demo-quality"]
    assert is_whole(repository.branches["main"]) and repository.tags["v1.0"] is repository.branches["main"]
    page = page_of(hub, "model", "org/demo-quality")
    assert "org/demo-data" in page and "0.5, by source" in page
    mine = pd.read_json(scored.parents[2] / "good.jsonl", lines=True)
    mine.to_parquet(tmp_path / "mine.parquet")
    scorer = find_scorer("model:org/demo-quality@v1.0")
    assert isinstance(scorer, LinearScorer)
    quality.score(str(tmp_path / "mine.parquet"), "model:org/demo-quality@v1.0", tmp_path / "scores.parquet")
    found = pd.read_parquet(tmp_path / "scores.parquet")
    expected = pd.read_parquet(scored.parent / "data" / "scores" / "scores.parquet").set_index("id")["quality_score"]
    both = found[found["id"].isin(expected.index)]
    assert len(both) > DOCUMENTS / 2
    assert both["quality_score"].tolist() == expected[both["id"]].tolist()
    # The examples on the page are what the scorer says of them.
    for text, score in re.findall(r'scorer.score\(\[(".*")\.encode\(\)\]\)  # ([\d.]+)', page):
        assert abs(scorer.score([json.loads(text).encode()])[0] - float(score)) < 0.001
    with pytest.raises(UserError, match="cannot be loaded as a text classifier"):
        find_scorer("model:org/demo-quality@v9").check()


def test_the_card_links_what_is_published_and_keeps_its_links(scored, hub):
    push(scored, "org/demo")
    repository = hub.repositories["model", "org/demo"]
    assert "org/demo-data" not in page_of(hub, "model", "org/demo")
    push(scored, "org/demo", data="scores", control="org/control", new_version="org/better")
    push(scored, "org/demo", scorer=True)
    head = page_of(hub, "model", "org/demo")
    metadata = yaml.safe_load(head.split("---\n")[1])
    assert metadata["datasets"] == ["org/demo-data"]
    assert (metadata["quality_scorer"], metadata["control_model"]) == ("org/demo-quality", "org/control")
    assert metadata["new_version"] == "org/better"
    for link in ("datasets/org/demo-data", "org/demo-quality", "org/control"):
        assert f"](https://huggingface.co/{link})" in head
    # Links alone do not move the tag.
    assert repository.tags["v1.0"] is not repository.branches["main"] and is_whole(repository.branches["main"])


def test_a_collection_is_made_and_extended(scored, hub):
    push(scored, "org/control", collection="Nano")
    (collection,) = hub.collections.values()
    assert collection["private"]
    everything: dict[str, Any] = {"scorer": True, "data": "scores", "control": "org/control", "public": True}
    for _ in range(2):
        push(scored, "org/demo", collection="Nano", **everything)
    assert list(hub.collections) == [collection["slug"]] and not collection["private"]
    assert [(item["type"], item["id"]) for item in collection["items"]] == [
        ("model", "org/control"),
        ("model", "org/demo"),
        ("model", "org/demo-quality"),
        ("dataset", "org/demo-data"),
    ]
    assert not any(hub.repositories[key].private for key in hub.repositories if key[1].startswith("org/demo"))
    with pytest.raises(UserError, match="1 to 59 characters"):
        push(scored, "org/demo", collection="x" * 60)


LOAD = """
import json
from datasets import load_dataset
splits = load_dataset("org/demo-data", revision="v1.0")
streamed = load_dataset("org/demo-data", split="train", streaming=True)
print(json.dumps([{name: rows.to_list() for name, rows in splits.items()}, [row["id"] for row in streamed]]))
"""


@pytest.mark.parametrize("kind", ["scores", "text"])
def test_the_data_loads_and_streams(kind, scored, hub, tmp_path):
    push(scored, "org/demo", data=kind)
    repository = hub.repositories["dataset", "org/demo-data"]
    assert is_whole(repository.branches["main"]) and repository.tags["v1.0"] is repository.branches["main"]
    place: Any = {"env": {**os.environ, **hub.environment(tmp_path / "empty")}, "cwd": tmp_path}
    done = subprocess.run([sys.executable, "-I", "-c", LOAD], capture_output=True, text=True, timeout=100, **place)
    assert done.returncode == 0, done.stderr
    splits, streamed = json.loads(done.stdout.splitlines()[-1])
    run = scored.parent / "data"
    kept = set(pd.read_parquet(run / "quality" / "kept.parquet")["id"])
    scores = pd.read_parquet(run / "scores" / "scores.parquet").set_index("id")["quality_score"]
    for split, rows in splits.items():
        documents = pd.concat(pd.read_parquet(path) for path in sorted((run / "documents").glob(f"{split}-*.parquet")))
        expected = [
            {
                "id": hashlib.sha256(row["text"].encode()).hexdigest(),
                "source": row["source"],
                "split": split,
                "quality_score": scores[row["id"]],
                "kept": row["id"] in kept or (split == "heldout" and scores[row["id"]] > 0.5),
                **({"text": row["text"]} if kind == "text" else {}),
            }
            for row in documents.to_dict("records")
        ]
        assert rows == expected
    assert streamed == [row["id"] for row in splits["train"]]
    metadata = yaml.safe_load(page_of(hub, "dataset", "org/demo-data").split("---\n")[1])
    assert metadata["license"] == ("cc-by-4.0" if kind == "text" else "apache-2.0")
    assert metadata["size_categories"] == ["n<1K"] and metadata["language"] == ["en"]
    counts = {split["name"]: split["num_examples"] for split in metadata["dataset_info"]["splits"]}
    assert counts == {name: len(rows) for name, rows in splits.items()}


def packed(recipe: Recipe, run: Path, tokenizer: Path) -> dict[str, str]:
    """Gathers, scores, selects and packs; the hash of each split's tokens."""
    data = run / "data"
    score = recipe.quality.scorer.partition("column:")[2] or None
    if not (data / "documents").exists():
        gather.gather(recipe.data, data / "documents", score)
        scoring.score(data / "documents", recipe.quality, recipe.data, recipe.seed, data / "scores")
        scoring.select(data / "documents", data / "scores", recipe.quality, data / "quality", recipe.training_seed)
    tokens = packing.pack(
        data / "documents", data / "quality", tokenizer, 16, recipe.data, recipe.training_seed, run / "tokens"
    )
    return {split: tokens[split]["sha256"] for split in ("train", "heldout")}


def recipe_on_the_card(hub: HubServer, like: Recipe, folder: Path) -> Recipe:
    """The recipe that the data's card gives, completed by the sections that it leaves out."""
    page = page_of(hub, "dataset", "org/demo-data")
    values = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])  # type: ignore[index]
    for source in values["data"]["sources"]:
        source.pop("revision", None)  # of the data set on the Hub, which the test reads from a folder
    rest = like.model_dump(mode="json", include={"name", "model", "training"})
    (folder / "again.yaml").write_text(yaml.safe_dump({**rest, **values, "tokenizer": {"vocab_size": 300}}))
    return load_recipe(folder / "again.yaml")


def download_data(hub: HubServer, folder: Path) -> Path:
    """The published data set, at `org/demo-data` below a folder: `datasets` remembers the Hub of an earlier test."""
    files = hub.repositories["dataset", "org/demo-data"].branches["main"].files
    for name in (name for name in files if name.endswith((".parquet", ".md"))):
        (folder / "org/demo-data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "org/demo-data" / name).write_bytes(files[name].data)
    return folder / "org/demo-data"


def join_as_on_the_card(hub: HubServer, published: Path, texts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the lines of the data's card that join texts with the published scores."""
    page = page_of(hub, "dataset", "org/demo-data")
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "joined" in block]
    mine = datasets.load_dataset("json", data_files=texts, split="train")
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, revision: load(str(published), split=split))
    exec(lines, {"mine": mine})


@pytest.mark.parametrize("kind", ["scores", "text"])
def test_a_recipe_over_the_published_data_gives_the_same_tokens(kind, scored, hub, tmp_path, monkeypatch):
    run = scored.parent
    push(scored, "org/demo", data=kind)
    published = download_data(hub, tmp_path)
    monkeypatch.chdir(tmp_path)
    if kind == "scores":
        join_as_on_the_card(hub, published, f"{scored.parents[2]}/*.jsonl", monkeypatch)
    recipe = recipe_on_the_card(hub, load_recipe(run / "recipe.yaml"), tmp_path)
    tokenizer = run / "data" / "tokenizer"
    shutil.rmtree(run / "tokens", ignore_errors=True)
    assert packed(recipe, tmp_path / "again", tokenizer) == packed(load_recipe(run / "recipe.yaml"), run, tokenizer)


def test_bad_input_is_one_line(scored, hub, tmp_path):
    run = Path(shutil.copytree(scored.parent, tmp_path / "runs" / "tiny"))
    prepare(run, scored.parents[2])
    with pytest.raises(UserError, match="no licence is stated for good, bad; state"):
        push(run / "release", "org/demo", data="text")
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**values, "quality": {"scorer": "column:score"}}))
    with pytest.raises(UserError, match=r"quality\.scorer 'column:score' has nothing to publish"):
        push(run / "release", "org/demo", scorer=True)
    with pytest.raises(UserError, match="--new-version better is not a Hub id"):
        push(scored, "org/demo", new_version="better")
    hub.add_repository("dataset", "org/demo-data", {"data/train.parquet": b"somebody else's"})
    with pytest.raises(UserError, match="org/demo-data holds files that no push of ours put there: main: data/train"):
        push(scored, "org/demo", data="scores")
    assert ("model", "org/demo") not in hub.repositories
    away = Path(shutil.copytree(scored, tmp_path / "away"))
    with pytest.raises(UserError, match="is not in its run directory"):
        push(away, "org/demo", scorer=True)
    record = json.loads((run / "record.json").read_text())
    record["stages"]["scores"]["key"] = "0" * 64
    (run / "record.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="release; run `nanophi release` again"):
        push(run / "release", "org/demo", data="scores")


@pytest.mark.parametrize(
    ("planted", "named"),
    [
        ("hf_" + "x1Y2" * 9, "a Hugging Face token in the text of document"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEow", "a private key in the text"),
        ("{run}/notes.txt", "a path of this machine"),
        ("-----BEGIN PRIVATE KEY----- is how one begins", None),
    ],
)
def test_secrets_and_paths_in_the_data_are_refused(planted, named, scored, tmp_path, monkeypatch):
    folder = tmp_path / "org-data"
    (folder / "data").mkdir(parents=True)
    texts = [f"Document {number} says nothing." for number in range(600)]
    texts[555] = f"It says {planted.format(run=scored.parent)} somewhere"
    ids = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    pd.DataFrame({"id": ids, "text": texts}).to_parquet(folder / "data" / "train-00000.parquet")
    write_manifest(folder, {"nanophi": "0"})
    wrong = pushing.problems(folder, scored, WRITTEN["data"])
    assert len(wrong) == (named is not None)
    if named is not None:
        assert named in wrong[0] and ids[555][:16] in wrong[0] and "x1Y2" not in wrong[0]


@pytest.mark.slow
def test_a_push_cut_at_any_request_is_finished_by_the_next(scored, tmp_path, monkeypatch):
    everything: dict[str, Any] = {"scorer": True, "data": "scores", "collection": "Nano", "public": True}
    generator, requests = random.Random(0), 0
    for _ in range(11):  # The first one counts the requests of a whole push, the others are cut somewhere in it.
        with HubServer() as hub:
            talk_to(hub, tmp_path / "home", monkeypatch)
            if requests:
                hub.cut(generator.randrange(requests), generator.choice(["before", "during", "after"]))
                with pytest.raises(UserError):
                    push(scored, "org/demo", **everything)
                for repository in hub.repositories.values():
                    head = repository.branches["main"]
                    assert set(head.files) == {".gitattributes"} or is_whole(head)
                hub.restore()
            push(scored, "org/demo", **everything)
            requests = requests or len(hub.requests)
            assert len(hub.repositories) == 3
            assert all(is_whole(entry.branches["main"]) and not entry.private for entry in hub.repositories.values())
            assert [len(entry["items"]) for entry in hub.collections.values()] == [3]


@pytest.mark.parametrize("part", ["scorer", "data", "gguf", "space"])
def test_a_companion_has_only_its_own_files(part, tmp_path):
    own = {"scorer.safetensors": "scorer", "scorer.json": "scorer", "tiny-q8_0.gguf": "gguf", "index.html": "space"}
    own |= {"data/heldout-00000.parquet": "data", "data/install.bat": "nobody"}
    (tmp_path / "data").mkdir()
    for name in ("README.md", *own):
        (tmp_path / name).write_text("{}")
    write_manifest(tmp_path, {"nanophi": "0"})
    wrong = {
        line.partition(" ")[0] for line in file_problems(tmp_path, written=WRITTEN[part]) if "nanophi writes" in line
    }
    assert wrong == {name for name, of in own.items() if of != part}
