"""The stages from sources to packed tokens, or to conversations: what each depends on and writes, and what makes it."""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanophi.core import bases
from nanophi.core.errors import UserError
from nanophi.core.files import copy_tree, read_json, sha256_of_file, sha256_of_tree, write_json
from nanophi.core.inputs import WEIGHTS
from nanophi.core.names import CODE_FILES, MODEL_FILES, TOKENIZER_FILES
from nanophi.core.recipe import Recipe, Source
from nanophi.core.run import RunDirectory
from nanophi.core.stages import Runner, Stage, Summary
from nanophi.data import scorers

PREPARE = ("documents", "scores", "quality", "tokenizer", "tokens", "conversations")

LATER: Any = {
    **dict.fromkeys(("engine", "workers", "max_tokens", "max_decay_tokens", "max_dropped", "max_lost"), True),
    "sources": {"__all__": {"license", "streaming", "weight", "phase"}},
}
"""Keys of `data` that do not change which documents there are."""


def data_stages(recipe: Recipe) -> list[Stage]:
    """What `nanophi prepare` makes for a recipe; the last stage is what a training reads."""
    if recipe.conversations:
        folders = ("base", "conversations", "tokenizer", "tokens", "documents", "quality")
        written = tuple(f"data/{name}" for name in folders)
        fields: dict[str, Any] = {"outside": _conversation_inputs, "changed": changed_data, "shared": False}
        return [Stage("conversations", written, _conversations, portable=True, **fields)]
    quality, seed = recipe.quality, recipe.training_seed
    share = {} if quality.share is None else {"share": quality.share, "select": quality.select, "seed": seed}
    chosen = {"threshold": quality.threshold, **share, **({} if quality.phase == "all" else {"phase": quality.phase})}
    trained = {"tokenizer": recipe.tokenizer.model_dump(mode="json"), "seed": recipe.seed}
    packed: dict[str, Any] = {
        "context_length": recipe.model_config_for().max_position_embeddings,
        "max_tokens": recipe.data.max_tokens,
        "weights": [source.weight for source in recipe.data.sources],
        "seed": seed,
    }
    phases = [quality.phase, *(source.phase for source in recipe.data.sources)]
    if recipe.two_phases or {*phases} != {"all"}:
        packed |= {"phases": phases, "max_decay_tokens": recipe.data.max_decay_tokens}

    def stage(name: str, build: Any, needs: tuple[str, ...], done: str, **fields: Any) -> Stage:
        failure = f"{'the tokenizer' if name == 'tokenizer' else 'documents'} cannot be {done}"
        return Stage(name, (f"data/{name}",), build, needs, failure=failure, portable=True, **fields)

    weights: dict[str, Any] = {"changed": changed_data}
    checked: dict[str, Any] = {"outside": _tokenizer_files, "check": _check_tokenizer}
    return [
        stage("documents", _documents, (), "gathered", outside=_document_inputs),
        stage("scores", _scores, ("documents",), "scored", outside=_score_inputs, check=_check_scorer),
        stage("quality", _quality, ("scores",), "selected", values=chosen, **weights),
        # Trained on all documents, so that a filtered run and its control share it.
        stage("tokenizer", _tokenizer, ("documents",), "made", values=trained, **checked, **weights),
        stage("tokens", _tokens, ("quality", "tokenizer"), "tokenized", values=packed, **weights),
    ]


def pinned(run: Runner, sources: Sequence[Source]) -> list[Source]:
    """Sources with the commit of each dataset on the Hub as its revision."""
    from nanophi.data.sources import is_on_hub

    return [
        source.model_copy(update={"revision": run.inputs.commit_of(source.hub, source.revision, "dataset")})
        if source.hub and is_on_hub(source)
        else source
        for source in sources
    ]


def read_tokens(tokens: Path) -> dict[str, Any]:
    """The contents of `tokens.json`. Raises `UserError` if the tokenizer beside `tokens` is not the one named there."""
    recorded: dict[str, Any] = read_json(tokens / "tokens.json")
    tokenizer = tokens.with_name("tokenizer")
    if recorded.get("tokenizer_sha256", now := sha256_of_tree(tokenizer)) != now:  # 0.1 named none
        raise UserError(
            f"{tokenizer} is not the tokenizer that {tokens} was made with; delete both and run `nanophi prepare` on "
            "the recipe, which makes them again and leaves the checkpoints alone"
        )
    return recorded


def split_hashes(tokens: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of each stream of tokens that a run's `tokens.json` describes, by its name there."""
    return {split: tokens[split]["sha256"] for split in ("train", "decay", "heldout") if split in tokens}


def token_hashes(tokens: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of what a training reads, from the contents of a run's `tokens.json`."""
    hashes = {f"{split}_sha256": sha256 for split, sha256 in split_hashes(tokens).items()}
    return hashes | {f"chat_{split}_sha256": value for split, value in tokens.get("conversations", {}).items()}


def changed_data(run: RunDirectory, work: Path) -> list[str]:
    """What in a folder of new data differs from what weights of this run were trained on."""
    trained = run.inputs_of("training")
    if trained is None or not run.weights():
        return []
    changed = []
    if (work / "data/tokens").exists():
        names = {"train": "training tokens", "decay": "the decay's tokens", "heldout": "held-out tokens"}
        names |= {"chat_train": "conversations", "chat_heldout": "held-out conversations"}
        hashes = token_hashes(read_json(work / "data/tokens/tokens.json"))
        changed = [
            what
            for name, what in names.items()
            if hashes.get(f"{name}_sha256") != trained["data"].get(f"{name}_sha256")
        ]
    if (work / "data/quality/kept.parquet").exists() and _selects_otherwise(run, work):
        changed.append("training tokens")
    if (work / "data/tokenizer").exists():
        changed += ["tokenizer"] * (sha256_of_tree(work / "data/tokenizer") != trained["data"]["tokenizer_sha256"])
    return changed


def _selects_otherwise(run: RunDirectory, work: Path) -> bool:
    """Whether a new selection keeps other documents than the one that this run's tokens were made of."""
    import pyarrow.parquet as pq

    tokens, quality = run.inputs_of("tokens"), run.record["stages"].get("quality")
    before = run.path / "data/quality/kept.parquet"
    if tokens is None or quality is None or tokens["quality"] != quality["key"] or not before.exists():
        return False
    files = (before, work / "data/quality/kept.parquet")
    kept = [sorted(pq.read_table(file, columns=["id"])["id"].to_pylist()) for file in files]
    return kept[0] != kept[1]


def _document_inputs(run: Runner) -> dict[str, Any]:
    from nanophi.data import sources

    data, benchmarks = run.recipe.data, run.recipe.data.decontamination.benchmarks
    data = data.model_copy(update={"sources": pinned(run, data.sources)})
    return {
        "data": data.model_dump(mode="json", exclude=LATER),
        "sources": [sources.fingerprint(source, run.inputs.contents) for source in data.sources],
        "benchmarks": run.inputs.contents.of(benchmarks) if benchmarks else None,
        "score": scorers.of_section(run.recipe.quality).column,
    }


def _documents(run: Runner, work: Path) -> Summary:
    """Sources to clean, deduplicated documents, split into train and held-out."""
    from nanophi.data import gather

    data = run.recipe.data.model_copy(update={"sources": pinned(run, run.recipe.data.sources)})
    return gather.gather(data, work / "data/documents", scorers.of_section(run.recipe.quality).column, run.report)


def _score_inputs(run: Runner) -> dict[str, Any]:
    recipe = run.recipe
    section = recipe.quality.model_dump(mode="json", exclude={"threshold", "share", "select", "phase"})
    identity = scorers.of_section(recipe.quality).identity(run.inputs.model)
    return {"quality": section, "seed": recipe.seed, **identity}


def _check_scorer(run: Runner) -> None:
    """A scorer that cannot be used is refused before the documents are read, unless it has scored them already."""
    inputs = _score_inputs(run)
    known = run.run.inputs_of("scores") or {}
    if any(known.get(key) != value for key, value in inputs.items() if key != "seed"):
        scorers.of_section(run.recipe.quality, inputs.get("scorer", {}).get("commit")).check()


def _scores(run: Runner, work: Path) -> Summary:
    from nanophi.data import scoring

    recipe, commit = run.recipe, _score_inputs(run).get("scorer", {}).get("commit")
    documents, output = run.path / "data/documents", work / "data/scores"
    return scoring.score(documents, recipe.quality, recipe.data, recipe.seed, output, revision=commit)


def _quality(run: Runner, work: Path) -> Summary:
    from nanophi.data import scoring

    data, recipe = run.path / "data", run.recipe
    folders = data / "documents", data / "scores"
    return scoring.select(*folders, recipe.quality, work / "data/quality", recipe.training_seed)


def _tokenizer_files(run: Runner) -> dict[str, Any]:
    path = run.recipe.tokenizer.path
    # A tokenizer's folder may hold a model's weights too, which are large and play no part.
    return {} if path is None else {"files": run.inputs.model(path, ignore=WEIGHTS)}


def _check_tokenizer(run: Runner) -> None:
    path, files = run.recipe.tokenizer.path, _tokenizer_files(run).get("files")
    if path is not None and files and (run.run.inputs_of("tokenizer") or {}).get("files") != files:
        from nanophi.data import tokenizer

        tokenizer.load(path, files.get("commit"))


def _tokenizer(run: Runner, work: Path) -> Summary:
    from nanophi.data import tokenizer

    recipe, commit = run.recipe, _tokenizer_files(run).get("files", {}).get("commit")
    documents, folder = run.path / "data/documents", work / "data/tokenizer"
    made = tokenizer.build(documents, recipe.tokenizer, recipe.seed, folder, revision=commit, report=run.report)
    return made | {"checked": tokenizer.check(documents, folder, recipe.data.max_lost, run.report)}


def _tokens(run: Runner, work: Path) -> Summary:
    from nanophi.data import packing

    data, recipe = run.path / "data", run.recipe
    context = recipe.model_config_for().max_position_embeddings
    folders = data / "documents", data / "quality", data / "tokenizer"
    return packing.pack(*folders, context, recipe.data, recipe.training_seed, work / "data/tokens")


def _conversation_inputs(run: Runner) -> dict[str, Any]:
    from nanophi.data import conversations, sources

    recipe, base = run.recipe, bases.find(str(run.recipe.base))
    chosen = pinned(run, recipe.conversations)
    return {
        "base": sha256_of_file(base.model / "model.safetensors"),
        "tokenizer": [sha256_of_file(file) for file in base.files(*TOKENIZER_FILES)],
        "conversations": [source.model_dump(mode="json") for source in chosen],
        "sources": [sources.fingerprint(source, run.inputs.contents) for source in chosen],
        "method": recipe.method,
        "template": conversations.TEXT_TEMPLATE,  # what a conversation of texts becomes
    }


def _conversations(run: Runner, work: Path) -> Summary:
    """The base with a chat template, the conversations, and what the card needs to know of how the base was made."""
    from transformers import AutoTokenizer

    from nanophi.data import conversations, sources

    recipe, base = run.recipe, bases.find(str(run.recipe.base))
    shutil.rmtree(work)  # of a killed attempt, of which no part is used again
    folder, output = work / "data/tokenizer", work / "data/conversations"
    folder.mkdir(parents=True)
    for file in base.files(*TOKENIZER_FILES):
        shutil.copyfile(file, folder / file.name)
    config = read_json(folder / "tokenizer_config.json")
    own = not config.get("chat_template") and not (folder / "chat_template.jinja").exists()
    if own:
        write_json(folder / "tokenizer_config.json", {**config, "chat_template": conversations.TEMPLATE})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context = read_json(base.model / "config.json")["max_position_embeddings"]
    read = base.documents if base.documents and any(base.documents.glob("train-*.parquet")) else None
    chosen = pinned(run, recipe.conversations)
    limit = recipe.data.max_dropped
    summary = conversations.build(chosen, recipe.method, tokenizer, context, read, output, limit)
    for name, count in summary["sources"].items():
        left = Counter(count)
        total, train, held = (left.pop(part, 0) for part in ("read", "train", "heldout"))
        line = f"{name}: {total:,} conversations read, {train:,} to train on, {held:,} held out"
        line += f", {left.total():,} left out ({sources.reasons(left)})" if left else ""
        short = summary["shortened"].get(name)
        run.report(line + (f"; {short:,} trained on without their last turns, which do not fit" if short else ""))
    summary |= {"base": base.recipe["name"], "repo_id": base.repo_id, "own_template": own, **base.history()}
    for file in (*base.files(*MODEL_FILES, *CODE_FILES), *folder.iterdir()):
        copy_tree(file, work / "data/base" / file.name)
    hashes: Summary = {"conversations": {key: summary.pop(f"{key}_sha256") for key in ("train", "heldout")}}
    hashes["tokenizer_sha256"] = sha256_of_tree(folder)  # with a template that the base's may lack
    for name in bases.RECORDS:
        record = read_json(base.records[name]) | (hashes if name == "tokens" else {})
        write_json(work / f"data/{name}/{name}.json", record)
    for file in base.documents.glob("heldout-*.parquet") if base.documents else ():
        copy_tree(file, work / "data/documents" / file.name)
    write_json(output / "conversations.json", summary)
    return summary
