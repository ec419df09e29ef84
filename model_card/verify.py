"""Check a release as a stranger would: nothing is taken from the run that made it.

Files are checked before anything is loaded. Then both loaders, stock Phi and remote code, load the release, each in a
fresh process away from this checkout, and what they compute is compared: with each other, with the card's sample, with
the shipped results.
"""

from __future__ import annotations

import difflib
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanophi.core import formatting
from nanophi.core.errors import UserError, one_line
from nanophi.core.files import read_json, sha256_of_file
from nanophi.core.names import resolve, split_revision
from nanophi.core.version import __version__
from nanophi.data.conversations import TEMPLATE
from nanophi.model_card import card as model_card
from nanophi.model_card import figures, file_checks, loader, metadata, signature
from nanophi.model_card.records import (
    ShippedRecords,
    complete_records,
    measures_heldout,
    model_record,
    read_records,
)
from nanophi.model_card.release import CODE_FILES, MANIFEST, license_text, list_files

Check = dict[str, Any]
"""`{"name": str, "passed": bool, "detail": one line}`"""

WEIGHTS = "model.safetensors"

TOLERANCE = 1e-4
"""Largest absolute difference of logits between the loaders, both in float32 on the CPU."""

LOG_LIKELIHOOD_TOLERANCE = 2e-3
"""Relative: recorded scores may come from bfloat16 or a GPU, the check computes in float32 on the CPU."""

BAD_MESSAGES = re.compile(
    r"newly initialized|not used when|of type .* to instantiate|should probably TRAIN|mismatch", re.S
)


def verify(
    release: str,
    revision: str | None = None,
    echo: Callable[[str], None] = print,
    *,
    trust_remote_code: bool = False,
    public_key: Path | None = None,
) -> list[Check]:
    """Check a release folder, or a repository on the Hub.

    Args:
        release: a folder, or `ORG/NAME` or `ORG/NAME@revision` on the Hub.
        revision: branch, tag or commit of a Hub repository.
        echo: called with one line for each check.
        trust_remote_code: run the release's code even if it is not the code of this version of nanophi.
        public_key: PEM file; if given, the release must carry its owner's signature.

    Returns:
        the checks in order: `{"name", "passed", "detail"}`.

    Raises:
        UserError: if there is no such release.
    """
    with tempfile.TemporaryDirectory(prefix="nanophi-verify-") as scratch:
        folder = locate(release, revision)
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{release} is not a release (no {MANIFEST}){hint(Path(release))}")
        checks: list[Check] = []

        def add(name: str, wrong: list[str], right: str) -> bool:
            detail = right if not wrong else "; ".join(wrong[:3]) + (f"; {len(wrong) - 3} more" if wrong[3:] else "")
            checks.append({"name": name, "passed": not wrong, "detail": detail})
            echo(f"  {'ok    ' if not wrong else 'FAILED'}  {name:<20} {detail}")
            return not wrong

        files = list_files(folder)
        safe = add("checksums", file_checks.checksums(folder, files), f"{len(files) - 1} files as the manifest says")
        if public_key is not None:
            safe &= add("signature", signature.problems(folder, public_key), f"by the owner of {public_key.name}")
        safe &= add("files", file_checks.foreign_files(folder, files), "safetensors only, no code but the two files")
        safe &= add(
            "code references", file_checks.foreign_references(folder), "no file names code outside this release"
        )
        same_code = _same_code(folder)
        safe &= add(
            "code",
            []
            if same_code or trust_remote_code
            else [f"differs from nanophi {__version__}; --trust-remote-code runs it"],
            f"that of nanophi {__version__}" if same_code else "not that of this nanophi, trusted by the user",
        )
        try:
            records = read_records(folder / "records")
            add("card", *_card(folder, records))
            add("provenance", _provenance(folder, records), "the manifest and the records agree")
            if not safe:
                add("loaders", ["not tried, because of the failures above"], "")
                return checks
            with complete_records():
                _load(folder, records, Path(scratch), add)
        except (UserError, OSError) as error:
            add("records", [str(error)], "")
        return checks


def _load(folder: Path, records: ShippedRecords, scratch: Path, add: Callable[[str, list[str], str], bool]) -> None:
    """The checks of what both loaders make of the release."""
    add("configuration", _configuration(folder, records), "that of the records, the tokenizer and the recipe")
    alike = (
        "drawn again, they look the same"
        if figures.drawn_alike(records)
        else "all there; not compared, for another version drew them"
    )
    add("figures", figures.problems(records, folder / "figures"), alike)
    stock, remote = loader.load(folder, records, scratch)
    add("stock Phi", _loads(stock, "transformers.PhiForCausalLM"), stock.get("class", ""))
    add("remote code", _loads(remote, "transformers_modules.NanoPhiForCausalLM"), remote.get("class", ""))
    if "class" in stock and "class" in remote:
        add("loaders agree", _agree(stock, remote), f"same greedy text, logits within {TOLERANCE:g}")
    if "class" in stock:
        add("parameters", _parameters(stock, records), formatting.integer(stock["parameters"]))
        add("sample", _sample(stock, records), "the card's sample regenerates")
        if measures_heldout(records) or "heldout.json" in records:
            items = records.get("heldout.json", [])
            right = f"log-likelihoods of {len(items)} held-out documents recomputed"
            add("evaluation", _scores(stock, records), right if items else "none is short enough to be shipped")


def locate(release: str, revision: str | None = None, patterns: list[str] | None = None) -> Path:
    """A release's folder, downloaded into the Hub's cache if it is not one here.

    Args:
        release: a folder, or `ORG/NAME` or `ORG/NAME@revision` on the Hub.
        revision: branch, tag or commit of a Hub repository.
        patterns: of the files to download; None: all.

    Raises:
        UserError: if there is no such release.
    """
    folder = resolve(release).folder
    if folder is not None:
        if revision is not None:
            raise UserError(f"--revision is for a repository on the Hub; {release} is a folder")
        return folder.resolve()
    release, named = split_revision(release)
    revision = revision or named
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    from nanophi.model_card.hub import one_line_errors

    with one_line_errors(release):
        try:
            return Path(snapshot_download(release, revision=revision, allow_patterns=patterns))
        except RepositoryNotFoundError:
            raise UserError(
                f"{release} is not on the Hub, or not visible with this token; check the name, or run `hf auth login`"
            ) from None
        except RevisionNotFoundError:
            raise UserError(f"{release} has no revision {revision}") from None


def hint(folder: Path) -> str:
    """`; did you mean FOLDER?` if the release is inside the folder, else nothing."""
    if (folder / "release" / MANIFEST).is_file():
        return f"; did you mean {folder / 'release'}?"
    snapshots = sorted(path.parent for path in folder.glob(f"snapshots/*/{MANIFEST}"))
    return f"; this is the Hub's cache, name one of its snapshots: {snapshots[-1]}" if snapshots else ""


def _same_code(folder: Path) -> bool:
    root = Path(model_card.__file__).parent.parent
    return all(
        (folder / name).is_file() and (folder / name).read_bytes() == (root / name).read_bytes() for name in CODE_FILES
    )


def card_problems(folder: Path, records: ShippedRecords) -> list[str]:
    """What in a release's card does not follow from its records, or would be refused by the Hub; one line each."""
    return _card(folder, records)[0]


def _card(folder: Path, records: ShippedRecords) -> tuple[list[str], str]:
    """The problems of the card, and in words what was compared."""
    compared = "every number follows from the shipped records"
    if not (folder / "README.md").is_file():
        return ["README.md is missing"], compared
    try:
        with complete_records():
            text = (folder / "README.md").read_text(encoding="utf-8")
            wrong = metadata.problems(text) + model_card.contradictions(records)
            expected = model_card.render(records)
            given = {name: content.encode() for name, content in metadata.eval_results_files(records).items()}
            written_by = records["run.json"]["environment"]["nanophi"]
    except UserError as error:
        return [str(error)], compared
    published = {path.name: path.read_bytes() for path in (folder / ".eval_results").glob("*") if path.is_file()}
    for name in sorted({*given, *published}):
        if published.get(name) != given.get(name):
            wrong.append(f".eval_results/{name} is not what the records give")
    if text == expected or written_by == __version__:
        return wrong + _differences(text.splitlines(), expected.splitlines()), compared
    # Another version words its card otherwise; its numbers must follow all the same.
    said, follows = (
        [line for line in card.splitlines() if line.startswith("|") and _numbers(line)] for card in (text, expected)
    )
    wrong += _differences(said, follows, _numbers, added=False)
    unknown = sorted(set(_numbers(text)) - set(_numbers(expected)))
    if unknown:
        wrong.append(f"README.md says {', '.join(unknown)}, which the records do not")
    return wrong, f"written by nanophi {written_by}: only its numbers were compared, those of tables in order"


def _differences(said: list[str], follows: list[str], key: Callable[[str], Any] = str, added: bool = True) -> list[str]:
    """Where two texts part. Lines are the same if their `key` is; `added`: what only the second has counts too."""
    matcher = difflib.SequenceMatcher(None, [key(line) for line in said], [key(line) for line in follows], False)
    return [
        f"README.md says {_short(said[a:b])}, the records say {_short(follows[c:d])}"
        for tag, a, b, c, d in matcher.get_opcodes()
        if tag != "equal" and (added or b > a)
    ]


def _numbers(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\d[\d,]*\.?\d*", text))


def _short(lines: list[str]) -> str:
    text = " / ".join(line.strip() for line in lines if line.strip()) or "nothing"
    return repr(text if len(text) <= 90 else text[:87] + "...")


def _provenance(folder: Path, records: ShippedRecords) -> list[str]:
    """Where the manifest, the records and the files beside them say different things of the same one."""
    try:
        provenance = read_json(folder / MANIFEST)["provenance"]
        recipe, environment, data = (provenance[key] for key in ("recipe_sha256", "environment", "data_sha256"))
    except (UserError, KeyError, TypeError):
        return [f"{MANIFEST} has no provenance"]
    absent = [f"{name} is missing" for name in ("revisions.json", WEIGHTS) if not (folder / name).is_file()]
    if absent:
        return absent
    weights = sha256_of_file(folder / WEIGHTS)
    with complete_records():
        run, training = records["run.json"], records["training.json"]
        tokens = {split: records["tokens.json"][split]["sha256"] for split in ("train", "heldout")}
        # The training's record is of its last step, in the type that it was trained in.
        trained = run["final"] and records["recipe.yaml"]["release"]["dtype"] == "float32"
        compared = [
            ("records/recipe.yaml is not the recipe of", recipe, sha256_of_file(folder / "records" / "recipe.yaml")),
            ("records/run.json has another environment than", environment, run["environment"]),
            ("records/tokens.json has other tokens than", data, tokens),
            (f"{WEIGHTS} has other weights than", provenance.get("weights_sha256", weights), weights),
        ]
        wrong = [f"{line} the manifest" for line, said, has in compared if said != has]
        if trained and training["summary"]["weights_sha256"] != weights:
            wrong.append(f"{WEIGHTS} has other weights than records/training.json")
        if read_json(folder / "revisions.json") != records["revisions.json"]:
            wrong.append("revisions.json differs from records/revisions.json")
    return wrong


def _configuration(folder: Path, records: ShippedRecords) -> list[str]:
    """What the files beside the weights say otherwise than the records, or than `release.build` writes them."""
    from transformers import AutoTokenizer

    recipe = records["recipe.yaml"]
    try:
        found = model_record(folder)["config"]
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config, generation, settings = (
            read_json(folder / name) for name in ("config.json", "generation_config.json", "tokenizer_config.json")
        )
    except Exception as error:  # whatever transformers makes of these files
        return [f"configuration or tokenizer cannot be read ({one_line(error)})"]
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id")}
    dtypes = dict.fromkeys(("dtype", "torch_dtype"), recipe["release"]["dtype"])
    expected = {**records["model.json"]["config"], **ids, **dtypes}
    found |= {key: config.get(key) for key in (*ids, *dtypes)}
    wrong = [
        f"config.json has {key} {found.get(key)!r}, not {value!r}"
        for key, value in expected.items()
        if found.get(key) != value
    ]
    # What is left out or false is the library's default, and `use_cache` only a matter of speed.
    said = {key: value for key, value in generation.items() if value is not None and value is not False}
    said = {key: value for key, value in said.items() if key not in ("transformers_version", "use_cache")}
    pads = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    written = {key: value for key, value in ids.items() if value is not None}
    if generation.get("do_sample") is not False or said.pop("pad_token_id", None) not in pads or said != written:
        wrong.append("generation_config.json is not the one that nanophi writes for this tokenizer")
    license_file = folder / "LICENSE"
    if not license_file.is_file() or license_file.read_text(encoding="utf-8") != license_text(records):
        wrong.append(f"LICENSE is not that of the recipe, {recipe['card']['license']}")
    template = folder / "chat_template.jinja"
    templates = [settings.get("chat_template"), template.read_text(encoding="utf-8") if template.is_file() else None]
    chat = records.get("conversations.json", {"own_template": recipe["tokenizer"]["path"] is None})
    if chat["own_template"]:  # otherwise it is that of a tokenizer from elsewhere
        ours = (TEMPLATE, None) if "conversations.json" in records else (None,)
        wrong += ["the chat template is not the one that nanophi ships" for text in templates if text not in ours][:1]
    return wrong


def _loads(loaded: dict[str, Any], expected: str) -> list[str]:
    if "error" in loaded:
        return [loaded["error"]]
    wrong = [f"{key}: {', '.join(value[:3])}" for key, value in loaded["loading"].items()]
    wrong += [message.splitlines()[0] for message in loaded["messages"] if BAD_MESSAGES.search(message)]
    if loaded["class"] != expected:
        wrong.append(f"loaded {loaded['class']}, expected {expected}")
    if loaded["uses_nanophi"]:
        wrong.append("the installed nanophi was imported")
    return wrong


def _agree(stock: dict[str, Any], remote: dict[str, Any]) -> list[str]:
    from safetensors.torch import load_file

    wrong = []
    if stock["texts"] != remote["texts"]:
        wrong.append(f"texts differ: {_short(stock['texts'])} and {_short(remote['texts'])}")
    a, b = load_file(stock["logits"])["logits"], load_file(remote["logits"])["logits"]
    difference = (a - b).abs().max().item() if a.shape == b.shape else math.inf
    if not difference <= TOLERANCE:
        wrong.append(f"logits differ by {difference:.2g}")
    return wrong


def _parameters(stock: dict[str, Any], records: ShippedRecords) -> list[str]:
    said = records["model.json"]["parameters"]
    found = stock["parameters"]
    return [] if found == said else [f"the model has {found:,}, the card says {said:,}"]


def _sample(stock: dict[str, Any], records: ShippedRecords) -> list[str]:
    if "sample.json" not in records:
        return ["records/sample.json is missing"]
    said, found = records["sample.json"]["text"], stock["texts"][0]
    if said == found:
        return []
    common = next((i for i, (a, b) in enumerate(zip(said, found, strict=False)) if a != b), min(len(said), len(found)))
    return [f"differs from character {common + 1}: card {_short([said[common:]])}, model {_short([found[common:]])}"]


def _scores(stock: dict[str, Any], records: ShippedRecords) -> list[str]:
    if "heldout.json" not in records:
        return ["records/heldout.json is missing, though the card has scores on held-out documents"]
    items = records["heldout.json"]
    return [
        f"held-out document {number}: recorded {item['log_likelihood']:.3f}, recomputed {found:.3f}"
        for number, (item, found) in enumerate(zip(items, stock["scores"], strict=True), 1)
        if not math.isclose(item["log_likelihood"], found, rel_tol=LOG_LIKELIHOOD_TOLERANCE)
    ]
