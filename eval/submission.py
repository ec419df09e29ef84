"""`nanophi submit`: the Open LLM Leaderboard's own checks of a submission, in its order, and the request files.

The boards are closed (v1 since June 2024, v2 since March 2025), so nothing is sent; mirrors read the same files.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.hf_api import RepoFile
from safetensors import safe_open
from typer import Option

from nanophi.core.errors import UserError, one_line
from nanophi.core.files import read_json, write_json
from nanophi.core.inputs import same_on_hub
from nanophi.core.names import is_hub_id, resolve, split_revision
from nanophi.core.options import ReleaseOrId, Revision
from nanophi.core.run import now

WITHOUT_CHAT = ("pretrained", "continuously pretrained")
MODEL_TYPES = (*WITHOUT_CHAT, "fine-tuned", "chat", "merge")
PRECISIONS = ("float16", "bfloat16", "float32")
MIN_CARD_CHARACTERS = 200
FIRST = "model base_model revision private precision weight_type status submitted_time model_type likes params license"
SECOND = (
    "model base_model revision precision params architectures weight_type status submitted_time model_type "
    "job_id job_start_time use_chat_template sender"
)
"""Keys of a board's requests."""
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "README.md", "records/*"]
"""What is downloaded of a repository: everything but the weights."""
Found = tuple[bool, str] | tuple[bool, str, str]
"""Whether a check passed, what was found, and a remedy if it is not the one in `CHECKS`."""


class Check(NamedTuple):
    """One check: its name, whether it passed, what was found, and what to do if it failed."""

    name: str
    passed: bool
    found: str
    remedy: str


def submit(
    model: ReleaseOrId,
    repo_id: Annotated[str | None, Option(metavar="ORG/NAME", help="Repository of a release folder.")] = None,
    revision: Revision = None,
    model_type: Annotated[
        str | None, Option(help="pretrained, fine-tuned, chat, ... [default: as the release's records say]")
    ] = None,
    base_model: Annotated[
        str | None, Option(metavar="ORG/NAME", help="What it was tuned from. [default: as the records say]")
    ] = None,
    precision: Annotated[str, Option(help="float16, bfloat16 or float32.")] = "bfloat16",
    sender: Annotated[str, Option(help="Your user name on the Hub.")] = "",
    output: Annotated[Path, Option(help="Where the request files go.")] = Path("requests"),
) -> None:
    """Check a model for the Open LLM Leaderboard.

    If all checks pass, the request file is written in both of its formats.

    Example: nanophi submit runs/demo/release --repo-id ORG/nano-phi-demo
    """
    submission = Submission(model, repo_id or "", revision or "", model_type, base_model, precision, output)
    checks = submission.checks()
    for number, check in enumerate(checks, 1):
        remedy = "" if check.passed else f"; {check.remedy}"
        typer.echo(f"{number:2} {'passed' if check.passed else 'FAILED'}  {check.name}: {check.found}{remedy}")
    if failed := [check.name for check in checks if not check.passed]:
        raise UserError(f"{len(failed)} of {len(checks)} checks failed ({', '.join(failed)}); no request written")
    for board, request in submission.formats(sender).items():
        path = output / board / f"{submission.repo_id}_eval_request_False_{precision}_Original.json"
        write_json(path, request)
        typer.echo(f"written: {path}")


@dataclasses.dataclass
class Submission:
    """A model to be submitted, and what its checks have found out about it.

    A folder is checked where it is and compared with `repo_id` on the Hub, which a board would read. What is not given
    is what the release's records state.
    """

    model: str | Path
    repo_id: str = ""
    revision: str = ""
    model_type: str | None = None
    base_model: str | None = None
    precision: str = "bfloat16"
    requests: Path = Path("requests")

    def __post_init__(self) -> None:
        named = resolve(self.model)
        if self.repo_id and not is_hub_id(self.repo_id):
            raise UserError(f"'{self.repo_id}' is not a Hub id like ORG/NAME (--repo-id)")
        self.repo_id = self.repo_id or named.repo_id or ""
        self.revision = self.revision or named.revision or "main"
        self.release = named.folder or "RELEASE"
        self.on_hub = named.folder is None
        self.folder = dataclasses.replace(named, revision=self.revision).fetch(SMALL_FILES)
        self.template, self.parameters, self.license = False, 0, ""
        self.info: Any = None
        self.config: Any = None

    def checks(self) -> list[Check]:
        """The board's checks, in order; each runs whether or not the ones before it passed."""
        found = []
        for name, remedy, function in CHECKS:
            try:
                passed, text, *other = function(self)
            except Exception as error:  # of the Hub, the network or a damaged file
                passed, text, other = False, one_line(error)[:160], []
            found.append(Check(name, passed, text, other[0] if other else remedy.format(self)))
        return found

    def formats(self, sender: str) -> dict[str, dict[str, Any]]:
        """The request in the format of each board; only the second one names a commit."""
        fields = {
            "model": self.repo_id,
            "base_model": self.base_model or "",
            "revision": self.revision,
            "private": False,
            "precision": self.precision,
            "params": round(self.parameters / 1e9, 3),
            "architectures": ";".join(self.config.architectures or []),
            "weight_type": "Original",
            "status": "PENDING",
            "submitted_time": now(),
            "model_type": self.model_type,
            "likes": self.info.likes or 0,
            "license": self.license,
            "job_id": -1,
            "job_start_time": None,
            # The tokenizer of a base may bring a template that the model never learned.
            "use_chat_template": self.template and self.model_type not in WITHOUT_CHAT,
            "sender": sender,
        }
        first, second = ({key: fields[key] for key in keys.split()} for keys in (FIRST, SECOND))
        return {"v1": first, "v2": second | {"revision": self.info.sha}}


def _type(model: Submission) -> Found:
    with contextlib.suppress(Exception):  # the release has no records, or not ours
        recipe = yaml.safe_load((model.folder / "records/recipe.yaml").read_text(encoding="utf-8"))
        base = split_revision(recipe["base"] or "")[0]
        if recipe["conversations"]:
            recorded = {"sft": "fine-tuned", "dpo": "chat"}[recipe["method"]]
            base = read_json(model.folder / "records/conversations.json")["repo_id"]
        else:
            recorded = "continuously pretrained" if base else "pretrained"
        model.model_type = model.model_type or recorded
        model.base_model = model.base_model or (base if is_hub_id(base or "") else None)
    found = f"{model.model_type} from {model.base_model or 'scratch'}, {model.precision}"
    if not model.model_type:
        return False, "there are no records of nanophi"
    if model.model_type not in MODEL_TYPES or model.precision not in PRECISIONS:
        return False, found, f"model type is one of {', '.join(MODEL_TYPES)}; precision of {', '.join(PRECISIONS)}"
    if model.model_type != "pretrained" and not model.base_model:
        return False, found, "the base has no name on the Hub: publish it first, or name it: --base-model"
    return True, found


def _revision(model: Submission) -> Found:
    if not model.repo_id:
        return False, "no repository was named", "name it: --repo-id ORG/NAME"
    model.info = HfApi().model_info(model.repo_id, revision=model.revision)
    return True, f"{model.revision} is {model.info.sha}"


def _config(model: Submission) -> Found:
    from transformers import AutoConfig

    model.config = AutoConfig.from_pretrained(model.folder, trust_remote_code=False)
    return True, type(model.config).__name__


def _tokenizer(model: Submission) -> Found:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False)
    model.template = bool(tokenizer.chat_template)
    return True, f"{type(tokenizer).__name__}, {len(tokenizer)} tokens"


def _reachable(model: Submission) -> Found:
    if model.info is None:
        return False, "the Hub returns none", "the repository must exist, and be public"
    return not model.info.private, "private" if model.info.private else "public"


def _license(model: Submission) -> Found:
    data = ModelCard.load(model.folder / "README.md").data.to_dict()
    model.license = str(data.get("license_name") or data.get("license") or "")
    named = bool(data.get("license_name") and data.get("license_link"))
    return named or data.get("license") not in (None, "", "other"), model.license or "none"


def _card(model: Submission) -> Found:
    count = len(ModelCard.load(model.folder / "README.md").text.strip())
    return count >= MIN_CARD_CHARACTERS, f"{count} characters, {MIN_CARD_CHARACTERS} needed"


def _safetensors(model: Submission) -> Found:
    if model.on_hub:
        counts = HfApi().get_safetensors_metadata(model.repo_id, revision=model.revision).parameter_count
        model.parameters = sum(counts.values())
    for path in [] if model.on_hub else model.folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            model.parameters += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return model.parameters > 0, f"{model.parameters:,} parameters"


def _same_on_hub(model: Submission) -> Found:
    """Whether the board, which reads the Hub, would get the model that was checked here."""
    if model.on_hub:
        return True, "it was read from there"
    if not model.repo_id:
        return False, "no repository was named", "name it: --repo-id ORG/NAME"
    tree = HfApi().list_repo_tree(model.repo_id, revision=model.revision)
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    every = {*there, *(path.name for path in model.folder.iterdir())}
    names = {name for name in every if name.endswith(".safetensors") or name in ("config.json", "tokenizer.json")}
    same = {x for x in names if x in there and (model.folder / x).is_file() and same_on_hub(model.folder / x, there[x])}
    if other := sorted(names - same):
        return False, f"{', '.join(other)} differ from {model.repo_id}"
    return True, f"{len(same)} files are the same"


def _first(model: Submission) -> Found:
    for path in sorted(model.requests.glob("**/*_eval_request_*.json")):
        request = read_json(path)
        same = request.get("model") == model.repo_id and request.get("precision") == model.precision
        if same and request.get("revision") in (model.revision, getattr(model.info, "sha", None)):
            return False, f"requested before: {path}"
    return True, "no earlier request"


def _template(model: Submission) -> Found:
    if not (model.folder / "chat_template.jinja").exists():
        return True, "in tokenizer_config.json, or there is none"
    inside = "chat_template" in read_json(model.folder / "tokenizer_config.json")
    return inside, "in both" if inside else "in a file of its own"


CHECKS: list[tuple[str, str, Callable[[Submission], Found]]] = [
    ("model type", "say what the model is: --model-type", _type),
    ("revision", "push it first (nanophi push), and check that {0.revision} is a branch, tag or commit", _revision),
    ("configuration without remote code", "config.json must name a model_type that transformers knows", _config),
    ("tokenizer", "put tokenizer.json and tokenizer_config.json beside the weights", _tokenizer),
    ("model information", "make it public: nanophi push {0.release} --repo-id {0.repo_id} --public", _reachable),
    ("license", "set the card's `license`; where it is `other`, also `license_name` and `license_link`", _license),
    ("card", "describe in README.md what the model is and how it was made", _card),
    ("safetensors", "save the weights as safetensors", _safetensors),
    ("same model on the Hub", "push this folder to {0.repo_id} first, or name its own", _same_on_hub),
    ("first of its kind", "it is in the queue; submit another revision or precision", _first),
    ("chat template in tokenizer_config.json", "v2 reads it from there: move it", _template),
]
"""The boards' checks, in their order: name, what to do if it fails, and the function."""
