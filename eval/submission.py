"""The Open LLM Leaderboard's own checks of a submission, in its order, and the request file.

    nanophi submit runs/nano-phi-115m/release --repo-id ORG/nano-phi-115M

The boards are closed (v1 since June 2024, v2 since March 2025). A well-formed release still passes their checks, and
mirrors of the boards read the same request files.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import transformers
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.hf_api import RepoFile

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json
from nanophi.core.inputs import same_on_hub
from nanophi.core.names import is_hub_id, resolve, split_revision
from nanophi.core.run import now

MODEL_TYPES = ("pretrained", "continuously pretrained", "fine-tuned", "chat", "merge")
WITHOUT_CHAT = ("pretrained", "continuously pretrained")
"""Those that have learned no conversation."""
PRECISIONS = ("float16", "bfloat16", "float32")
MIN_CARD_CHARACTERS = 200


@dataclasses.dataclass(frozen=True)
class Check:
    """One check: its name, whether it passed, what was found, and what to do if it failed."""

    name: str
    passed: bool
    found: str
    remedy: str


def check(
    model: str | Path,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    model_type: str | None = None,
    precision: str = "bfloat16",
    weight_type: str = "Original",
    base_model: str | None = None,
    requests: Path | None = None,
) -> list[Check]:
    """The board's checks, in order; each runs whether or not the ones before it passed.

    Beside them stands one of ours: that a folder holds the model that is on the Hub, which is what a board would read.

    Args:
        model: release folder, or `ORG/NAME` or `ORG/NAME@revision` on the Hub. The contents of a folder are checked
            there, and compared with those on the Hub.
        repo_id: `ORG/NAME` that the folder is, or will be, pushed to; for a Hub id, itself.
        revision: branch, tag or commit on the Hub; None: that of `model`, or main.
        model_type: one of `MODEL_TYPES`; None: what the release's records say.
        precision: the precision in which the board should run the model, one of `PRECISIONS`.
        weight_type: `Original`, `Adapter` or `Delta`.
        base_model: Hub id of what a model that is not pretrained from scratch began as; None: as the records say.
        requests: folder of earlier requests; one that repeats them fails.
    """
    return _Submission(model, repo_id, revision, model_type, precision, weight_type, base_model, requests).checks()


def submit(
    model: str | Path,
    output: Path,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    model_type: str | None = None,
    precision: str = "bfloat16",
    weight_type: str = "Original",
    base_model: str | None = None,
    sender: str = "",
    report: Callable[[str], None] = print,
) -> list[Path]:
    """Run the checks and, if all pass, write the request file in the formats of both boards.

    Args: those of `check`, and:
        output: folder for the requests: `v1/ORG/NAME_eval_request_False_bfloat16_Original.json`, and `v2/...`.
        sender: user name on the Hub, for v2.
        report: called with one line per check.

    Returns:
        the files written.

    Raises:
        UserError: if a check fails; then nothing is written.
    """
    submission = _Submission(model, repo_id, revision, model_type, precision, weight_type, base_model, Path(output))
    checks = submission.checks()
    for line in render(checks).splitlines():
        report(line)
    failed = [entry.name for entry in checks if not entry.passed]
    if failed:
        raise UserError(f"{len(failed)} of {len(checks)} checks failed ({', '.join(failed)}); no request written")
    files = []
    for board, request in (
        ("v1", submission.request_v1()),
        ("v2", submission.request_v2(sender)),
    ):
        path = Path(output) / board / f"{submission.repo_id}_eval_request_False_{precision}_{weight_type}.json"
        write_json(path, request)
        files.append(path)
        report(f"written: {path}")
    return files


def render(checks: Sequence[Check]) -> str:
    """One line per check, the remedy with those that failed."""
    lines = []
    for number, entry in enumerate(checks, 1):
        remedy = "" if entry.passed else f"; {entry.remedy}"
        lines.append(f"{number:2} {'passed' if entry.passed else 'FAILED'}  {entry.name}: {entry.found}{remedy}")
    return "\n".join(lines)


class _Submission:
    """A model to be submitted, and what is known about it."""

    def __init__(
        self,
        model: str | Path,
        repo_id: str | None,
        revision: str | None,
        model_type: str | None,
        precision: str,
        weight_type: str,
        base_model: str | None,
        requests: Path | None,
    ) -> None:
        self.folder = resolve(model).folder
        self.source, named = split_revision(str(model))
        if repo_id is not None and not is_hub_id(repo_id):
            raise UserError(f"'{repo_id}' is not a Hub id like ORG/NAME (--repo-id)")
        self.repo_id = repo_id or ("" if self.folder else self.source)
        self.revision = revision or named or "main"
        self.model_type, self.precision, self.weight_type = model_type, precision, weight_type
        self.base_model, self.requests = base_model, requests
        self.template = False
        self.info: Any = None
        self.config: Any = None
        self.card: ModelCard | None = None
        self.parameters: int | None = None

    def checks(self) -> list[Check]:
        return [
            self._type(),
            self._revision(),
            self._config(),
            self._tokenizer(),
            self._reachable(),
            self._license(),
            self._card_text(),
            self._safetensors(),
            self._same_on_hub(),
            self._not_twice(),
            self._chat_template(),
        ]

    def request_v1(self) -> dict[str, Any]:
        """The request of the first board (2023 to June 2024)."""
        return {
            "model": self.repo_id,
            "base_model": self.base_model or "",
            "revision": self.revision,
            "private": False,
            "precision": self.precision,
            "weight_type": self.weight_type,
            "status": "PENDING",
            "submitted_time": now(),
            "model_type": self.model_type,
            "likes": getattr(self.info, "likes", 0) or 0,
            "params": round((self.parameters or 0) / 1e9, 3),
            "license": self._license_name(),
        }

    def request_v2(self, sender: str) -> dict[str, Any]:
        """The request of the second board (June 2024 to March 2025), which names a commit."""
        return {
            "model": self.repo_id,
            "base_model": self.base_model or "",
            "revision": self.info.sha,
            "precision": self.precision,
            "params": round((self.parameters or 0) / 1e9, 3),
            "architectures": ";".join(self.config.architectures or []),
            "weight_type": self.weight_type,
            "status": "PENDING",
            "submitted_time": now(),
            "model_type": self.model_type,
            "job_id": -1,
            "job_start_time": None,
            # The tokenizer of a base may bring a template that the model never learned.
            "use_chat_template": self.template and self.model_type not in WITHOUT_CHAT,
            "sender": sender,
        }

    def _type(self) -> Check:
        name = "model type"
        recorded, base = self._origin()
        self.model_type, self.base_model = self.model_type or recorded, self.base_model or base
        if not self.model_type:
            return Check(name, False, "there are no records of nanophi", "say what the model is: --model-type")
        known = self.model_type in MODEL_TYPES and self.precision in PRECISIONS
        remedy = f"model type is one of {', '.join(MODEL_TYPES)}; precision one of {', '.join(PRECISIONS)}"
        if known and self.model_type != "pretrained" and not self.base_model:
            known, remedy = False, "the base has no name on the Hub: publish it first, or name it: --base-model"
        of_base = f" from {self.base_model}" if self.base_model else ""
        return Check(name, known, f"{self.model_type}{of_base}, {self.precision}", remedy)

    def _origin(self) -> tuple[str | None, str | None]:
        """Model type and the base's Hub id, as the release's records have them; None where they do not say."""
        try:
            recipe = yaml.safe_load(self._read("records/recipe.yaml"))
            if recipe["conversations"]:
                base = json.loads(self._read("records/conversations.json"))["repo_id"]
                return {"sft": "fine-tuned", "dpo": "chat"}[recipe["method"]], base
            if not recipe["base"]:
                return "pretrained", None
            base = split_revision(recipe["base"])[0]
            return "continuously pretrained", base if is_hub_id(base) else None
        except Exception:  # of the Hub, the network or the file: they are not there, or not ours
            return None, None

    def _revision(self) -> Check:
        remedy = f"push it first (nanophi push), and check that {self.revision} is a branch, tag or commit there"
        if not self.repo_id:
            return Check("revision", False, "no repository was named", "name it: --repo-id ORG/NAME")
        try:
            self.info = HfApi().model_info(self.repo_id, revision=self.revision)
        except Exception as error:
            return Check("revision", False, f"{self.repo_id}@{self.revision}: {_short(error)}", remedy)
        return Check("revision", True, f"{self.revision} is {self.info.sha}", remedy)

    def _config(self) -> Check:
        remedy = "boards run no remote code: config.json must name a model_type that transformers knows"
        try:
            self.config = transformers.AutoConfig.from_pretrained(
                self.source, trust_remote_code=False, **self._at_revision()
            )
        except Exception as error:
            return Check("configuration without remote code", False, _short(error), remedy)
        return Check("configuration without remote code", True, type(self.config).__name__, remedy)

    def _tokenizer(self) -> Check:
        remedy = "put tokenizer.json and tokenizer_config.json beside the weights"
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                self.source, trust_remote_code=False, **self._at_revision()
            )
        except Exception as error:
            return Check("tokenizer", False, _short(error), remedy)
        self.template = bool(tokenizer.chat_template)
        return Check("tokenizer", True, f"{type(tokenizer).__name__}, {len(tokenizer)} tokens", remedy)

    def _reachable(self) -> Check:
        if self.info is None:
            return Check("model information", False, "the Hub returns none", "the repository must exist, and be public")
        folder = self.folder or "RELEASE"
        remedy = f"a board reads what is public: nanophi push {folder} --repo-id {self.repo_id} --public"
        return Check("model information", not self.info.private, "private" if self.info.private else "public", remedy)

    def _license(self) -> Check:
        remedy = "set `license` in the card's metadata, or `license_name` and `license_link` where it is `other`"
        problem = self._load_card()
        if problem:
            return Check("license", False, problem, remedy)
        data = self.card.data.to_dict() if self.card else {}
        named = bool(data.get("license_name") and data.get("license_link"))
        passed = named or bool(data.get("license") and data["license"] != "other")
        return Check("license", passed, self._license_name() or "none", remedy)

    def _card_text(self) -> Check:
        remedy = "describe in README.md what the model is and how it was made"
        count = len(self.card.text.strip()) if self.card else 0
        return Check("card", count >= MIN_CARD_CHARACTERS, f"{count} characters, {MIN_CARD_CHARACTERS} needed", remedy)

    def _safetensors(self) -> Check:
        remedy = "save the weights as safetensors"
        try:
            self.parameters = self._count_parameters()
        except Exception as error:
            return Check("safetensors", False, _short(error), remedy)
        return Check("safetensors", self.parameters > 0, f"{self.parameters:,} parameters", remedy)

    def _same_on_hub(self) -> Check:
        """Whether the board, which reads the Hub, would get the model that was checked here."""
        name, remedy = "same model on the Hub", f"push this folder to {self.repo_id} first, or name its own"
        if self.folder is None:
            return Check(name, True, "it was read from there", remedy)
        if not self.repo_id:
            return Check(name, False, "no repository was named", "name it: --repo-id ORG/NAME")
        try:
            tree = HfApi().list_repo_tree(self.repo_id, revision=self.revision)
            there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        except Exception as error:
            return Check(name, False, _short(error), remedy)
        here = [*self.folder.glob("*.safetensors"), *(self.folder / file for file in ("config.json", "tokenizer.json"))]
        files = [path for path in sorted(here) if path.is_file()]
        weights = {path.name for path in files} | {path for path in there if path.endswith(".safetensors")}
        other = sorted(
            weights - {path.name for path in files if path.name in there and same_on_hub(path, there[path.name])}
        )
        found = f"{', '.join(other)} differ from {self.repo_id}" if other else f"{len(files)} files are the same"
        return Check(name, not other, found, remedy)

    def _not_twice(self) -> Check:
        remedy = "it is in the queue; submit another revision or precision"
        sha = getattr(self.info, "sha", None)
        for path in sorted(self.requests.glob("**/*_eval_request_*.json")) if self.requests else []:
            request = read_json(path)
            same = request.get("model") == self.repo_id and request.get("precision") == self.precision
            if same and request.get("revision") in (self.revision, sha):
                return Check("first of its kind", False, f"requested before: {path}", remedy)
        return Check("first of its kind", True, "no earlier request", remedy)

    def _chat_template(self) -> Check:
        remedy = "v2 reads the chat template from tokenizer_config.json: move it there"
        name = "chat template in tokenizer_config.json"
        files = self._files()
        if "chat_template.jinja" not in files and "chat_template.json" not in files:
            return Check(name, True, "in tokenizer_config.json, or there is none", remedy)
        try:
            inside = "chat_template" in json.loads(self._read("tokenizer_config.json"))
        except (OSError, ValueError) as error:
            return Check(name, False, _short(error), remedy)
        return Check(name, inside, "in both" if inside else "in a file of its own", remedy)

    def _at_revision(self) -> dict[str, str]:
        return {} if self.folder else {"revision": self.revision}

    def _files(self) -> list[str]:
        if self.folder:
            return [path.name for path in self.folder.iterdir()]
        return [sibling.rfilename for sibling in getattr(self.info, "siblings", None) or []]

    def _read(self, name: str) -> str:
        path = self.folder / name if self.folder else Path(self._download(name))
        return path.read_text(encoding="utf-8")

    def _download(self, name: str) -> str:
        return huggingface_hub.hf_hub_download(self.repo_id, name, revision=self.revision)

    def _load_card(self) -> str:
        """Read the card. Returns what is wrong with it, or an empty string."""
        try:
            self.card = ModelCard(self._read("README.md"))
        except FileNotFoundError:
            return "there is no README.md"
        except Exception as error:
            return _short(error)
        return ""

    def _license_name(self) -> str:
        data = self.card.data.to_dict() if self.card else {}
        return str(data.get("license_name") or data.get("license") or "")

    def _count_parameters(self) -> int:
        if not self.folder:
            return sum(HfApi().get_safetensors_metadata(self.repo_id, revision=self.revision).parameter_count.values())
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise UserError("there is no .safetensors file")
        total = 0
        for path in files:
            with safetensors.safe_open(path, framework="pt") as tensors:
                total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
        return total


def _short(error: Exception) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
