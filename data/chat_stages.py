"""The stage before a chat model's training: its base, a tokenizer with a chat template, and the conversations."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from nanophi.core import bases
from nanophi.core.errors import UserError
from nanophi.core.files import copy_tree, read_json, sha256_of_file, write_json
from nanophi.data.stages import DataStages

OUTPUTS = ["data/base", "data/conversations", "data/tokenizer", "data/tokens", "data/documents", "data/quality"]
TOKENIZER = re.compile(r"(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template)[\w.]*")
MODEL = re.compile(r"(generation_)?config\.json|model\.safetensors|(configuration|modeling)_nanophi\.py")


class ChatStages(DataStages):
    """`DataStages`, of which a recipe with conversations has one."""

    def tokens(self) -> dict[str, Any]:
        """What a training reads: packed rows, or conversations."""
        return self.conversations() if self.recipe.conversations else super().tokens()

    def require_tokens(self) -> None:
        """Check that it is there already. Raises `UserError` if it is not."""
        if not self.recipe.conversations:
            super().require_tokens()
        elif not (self.path / "data/conversations").exists():
            raise UserError(f"{self.path / 'data/conversations'} is missing; run `nanophi prepare` on the recipe")

    def conversations(self) -> dict[str, Any]:
        """The base with a chat template, the conversations, and what the card says of how the base was made."""
        from nanophi.data import conversations, sources

        recipe, base = self.recipe, bases.find(str(self.recipe.base))
        pinned = self.pinned(recipe.conversations)
        files = sorted(file for file in base.model.iterdir() if TOKENIZER.fullmatch(file.name))
        inputs = {
            "base": sha256_of_file(base.model / "model.safetensors"),
            "tokenizer": [sha256_of_file(file) for file in files],
            "conversations": [source.model_dump(mode="json") for source in pinned],
            "sources": [sources.fingerprint(source, self.inputs.contents) for source in pinned],
            "method": recipe.method,
            "template": conversations.TEMPLATE,
        }

        def build(work: Path) -> dict[str, Any]:
            from transformers import AutoTokenizer

            shutil.rmtree(work)  # of a killed attempt, of which no part is used again
            folder, output = work / "data/tokenizer", work / "data/conversations"
            folder.mkdir(parents=True)
            for file in files:
                shutil.copyfile(file, folder / file.name)
            config = read_json(folder / "tokenizer_config.json")
            own = not config.get("chat_template") and not (folder / "chat_template.jinja").exists()
            if own:
                write_json(folder / "tokenizer_config.json", {**config, "chat_template": conversations.TEMPLATE})
            tokenizer = AutoTokenizer.from_pretrained(folder)
            context = read_json(base.model / "config.json")["max_position_embeddings"]
            read = base.documents if base.documents and any(base.documents.glob("train-*.parquet")) else None
            summary = conversations.build(pinned, recipe.method, tokenizer, context, read, output)
            for name, count in summary["sources"].items():
                left = Counter(count)
                total, train, held = (left.pop(part, 0) for part in ("read", "train", "heldout"))
                line = f"{name}: {total:,} conversations read, {train:,} to train on, {held:,} held out"
                self.report(line + (f", {left.total():,} left out ({sources.reasons(left)})" if left else ""))
            summary |= {"base": base.recipe["name"], "repo_id": base.repo_id, "own_template": own}
            for file in [*filter(lambda file: MODEL.fullmatch(file.name), base.model.iterdir()), *folder.iterdir()]:
                copy_tree(file, work / "data/base" / file.name)
            hashes = {"conversations": {key: summary.pop(f"{key}_sha256") for key in ("train", "heldout")}}
            for name, record in base.records.items():
                content = read_json(record) | (hashes if name == "tokens" else {})
                write_json(work / f"data/{name}/{name}.json", content)
            for file in base.documents.glob("heldout-*.parquet") if base.documents else ():
                copy_tree(file, work / "data/documents" / file.name)
            write_json(output / "conversations.json", summary)
            return summary

        return self._stage("conversations", inputs, OUTPUTS, build, shared=False, accept=self._keep_data_of_weights)
