"""What the parts of a release say of each other, and what both loaders compute of it; each check lists what is wrong.

Which of them are made, and in which order, is in `verify.py`; the files by themselves are checked in `manifest.py`.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanophi.core import formatting
from nanophi.core.errors import UserError, one_line
from nanophi.core.files import read_json, sha256_of_file
from nanophi.core.names import CODE_FILES
from nanophi.core.version import __version__
from nanophi.data.conversations import TEMPLATE, TEXT_TEMPLATE
from nanophi.data.stages import split_hashes
from nanophi.model_card import card as model_card
from nanophi.model_card import figures, loader, metadata
from nanophi.model_card.consistency import contradictions, scores
from nanophi.model_card.manifest import MANIFEST
from nanophi.model_card.records import ShippedRecords, complete_records, measures_heldout, model_record
from nanophi.model_card.release import license_text

WEIGHTS = "model.safetensors"
TOLERANCE = 1e-4  # largest absolute difference of logits between the loaders, both in float32 on the CPU
# Relative: recorded scores may come from bfloat16 or a GPU, the check computes in float32 on the CPU.
LOG_LIKELIHOOD_TOLERANCE = 2e-3
BAD_MESSAGES = "(?s)newly initialized|not used when|of type .* to instantiate|should probably TRAIN|mismatch"


def has_same_code(folder: Path) -> bool:
    """Whether the release's two Python files are those of this nanophi."""
    pairs = [(folder / name, Path(__file__).parents[1] / name) for name in CODE_FILES]
    return all(theirs.is_file() and theirs.read_bytes() == ours.read_bytes() for theirs, ours in pairs)


def card(folder: Path, records: ShippedRecords) -> tuple[list[str], str]:
    """What in the card does not follow from the records, or would be refused by the Hub; and what was compared."""
    compared = "every number follows from the shipped records"
    if not (folder / "README.md").is_file():
        return ["README.md is missing"], compared
    try:
        with complete_records():
            text = (folder / "README.md").read_text(encoding="utf-8")
            wrong = metadata.problems(text) + contradictions(records)
            expected = model_card.render(records)
            given = {name: content.encode() for name, content in metadata.eval_results_files(records).items()}
            written_by = records["run.json"]["environment"]["nanophi"]
    except UserError as error:
        return [str(error)], compared
    published = {path.name: path.read_bytes() for path in (folder / ".eval_results").glob("*") if path.is_file()}
    differing = sorted(name for name in {*given, *published} if published.get(name) != given.get(name))
    wrong += [f".eval_results/{name} is not what the records give" for name in differing]
    if text == expected or written_by == __version__:
        return wrong + _differences(text.splitlines(), expected.splitlines()), compared
    # Another version words its card otherwise; its numbers must follow all the same.
    wrong += _differences(_table_rows(text), _table_rows(expected), _numbers, added=False)
    if unknown := sorted(set(_numbers(text)) - set(_numbers(expected))):
        wrong.append(f"README.md has {', '.join(unknown)}, which the records do not")
    return wrong, f"written by nanophi {written_by}: only its numbers were compared, those of tables in order"


def _differences(
    lines: list[str], expected: list[str], key: Callable[[str], Any] = str, added: bool = True
) -> list[str]:
    """Where two texts part. Lines are the same if their `key` is; `added`: what only the second has counts too."""
    matcher = difflib.SequenceMatcher(None, [key(line) for line in lines], [key(line) for line in expected], False)
    return [
        f"README.md has {_short(lines[a:b])}, the records give {_short(expected[c:d])}"
        for tag, a, b, c, d in matcher.get_opcodes()
        if tag != "equal" and (added or b > a)
    ]


def _table_rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|") and _numbers(line)]


def _numbers(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\d[\d,]*\.?\d*", text))


def _short(lines: list[str]) -> str:
    text = " / ".join(line.strip() for line in lines if line.strip()) or "nothing"
    return repr(text if len(text) <= 90 else text[:87] + "...")


def provenance(folder: Path, records: ShippedRecords) -> list[str]:
    """Where the manifest, the records and the files beside them differ about the same thing."""
    try:
        manifest = read_json(folder / MANIFEST)["provenance"]
        recipe, environment, data = (manifest[key] for key in ("recipe_sha256", "environment", "data_sha256"))
    except (UserError, KeyError, TypeError):
        return [f"{MANIFEST} has no provenance"]
    if absent := [f"{name} is missing" for name in ("revisions.json", WEIGHTS) if not (folder / name).is_file()]:
        return absent
    weights = sha256_of_file(folder / WEIGHTS)
    with complete_records():
        run, training = records["run.json"], records["training.json"]
        tokens = split_hashes(records["tokens.json"])
        # The training's record is of its last step, in the type that it was trained in.
        trained = run["final"] and records["recipe.yaml"]["release"]["dtype"] == "float32"
        recorded = training["summary"]["weights_sha256"] if trained else weights
        shipped, revisions = sha256_of_file(folder / "records/recipe.yaml"), read_json(folder / "revisions.json")
        same = {
            "records/recipe.yaml is not the recipe of the manifest": recipe == shipped,
            "records/run.json has another environment than the manifest": environment == run["environment"],
            "records/tokens.json has other tokens than the manifest": data == tokens,
            f"{WEIGHTS} has other weights than the manifest": manifest.get("weights_sha256", weights) == weights,
            f"{WEIGHTS} has other weights than records/training.json": recorded == weights,
            "revisions.json differs from records/revisions.json": revisions == records["revisions.json"],
        }
    return [line for line, agrees in same.items() if not agrees]


def computed(folder: Path, records: ShippedRecords, scratch: Path) -> Iterator[tuple[str, list[str], str]]:
    """The checks that need the release loaded, in order: name, what is wrong, and the detail if nothing is."""
    yield "scores", *scores(records)
    yield "configuration", configuration(folder, records), "that of the records, the tokenizer and the recipe"
    alike = "drawn again, they look the same"
    other = "all there; not compared, for another version drew them"
    yield "figures", figures.problems(records, folder / "figures"), alike if figures.drawn_alike(records) else other
    stock, remote = loader.load(folder, records, scratch)
    yield "stock Phi", _loads(stock, "transformers.PhiForCausalLM"), stock.get("class", "")
    yield "remote code", _loads(remote, "transformers_modules.NanoPhiForCausalLM"), remote.get("class", "")
    if "class" in stock and "class" in remote:
        yield "loaders agree", _agree(stock, remote), f"same greedy text, logits within {TOLERANCE:g}"
    if "class" in stock:
        expected, found = records["model.json"]["parameters"], stock["parameters"]
        wrong = [f"the model has {found:,}, the card has {expected:,}"] if found != expected else []
        yield "parameters", wrong, formatting.integer(found)
        yield "sample", _sample(stock, records), "the card's sample regenerates"
        if measures_heldout(records) or "heldout.json" in records:
            number = len(records.get("heldout.json", []))
            yield "evaluation", _scores(stock, records), f"log-likelihoods of {number} held-out documents recomputed"


def configuration(folder: Path, records: ShippedRecords) -> list[str]:
    """Where the files beside the weights are not what the records have, or what `release.build` writes."""
    from transformers import AutoTokenizer

    recipe, parts = records["recipe.yaml"], ("config", "generation_config", "tokenizer_config")
    try:
        found = model_record(folder)["config"]
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config, generation, settings = (read_json(folder / f"{part}.json") for part in parts)
    except Exception as error:  # whatever transformers makes of these files
        return [f"configuration or tokenizer cannot be read ({one_line(error)})"]
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id")}
    dtypes = dict.fromkeys(("dtype", "torch_dtype"), recipe["release"]["dtype"])
    expected = {**records["model.json"]["config"], **ids, **dtypes}
    found |= {key: config.get(key) for key in (*ids, *dtypes)}
    differing = {key: value for key, value in expected.items() if found.get(key) != value}
    wrong = [f"config.json has {key} {found.get(key)!r}, not {value!r}" for key, value in differing.items()]
    # What is left out or false is the library's default, and `use_cache` only a matter of speed.
    left_out = ("transformers_version", "use_cache", "pad_token_id")
    stated = {key: value for key, value in generation.items() if key not in left_out}
    written = {key: value for key, value in stated.items() if value is not None and value is not False}
    own = {key: number for key, number in ids.items() if number is not None}
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    if generation.get("do_sample") is not False or generation.get("pad_token_id") not in pads or written != own:
        wrong.append("generation_config.json is not the one that nanophi writes for this tokenizer")
    texts = [folder / "LICENSE", folder / "chat_template.jinja"]
    licence, template = (path.read_text(encoding="utf-8") if path.is_file() else None for path in texts)
    if licence != license_text(records):
        wrong.append(f"LICENSE is not that of the recipe, {recipe['card']['license']}")
    templates = [settings.get("chat_template"), template]
    chat = records.get("conversations.json")
    own_template = chat["own_template"] if chat else recipe["tokenizer"]["path"] is None  # or that of another tokenizer
    if own_template and not set(templates) <= {None, *((TEMPLATE, TEXT_TEMPLATE) if chat else ())}:
        wrong.append("the chat template is not the one that nanophi ships")
    return wrong


def _loads(loaded: dict[str, Any], expected: str) -> list[str]:
    if "error" in loaded:
        return [loaded["error"]]
    wrong = [f"{key}: {', '.join(value[:3])}" for key, value in loaded["loading"].items()]
    wrong += [message.splitlines()[0] for message in loaded["messages"] if re.search(BAD_MESSAGES, message)]
    return wrong + ([f"loaded {loaded['class']}, expected {expected}"] if loaded["class"] != expected else [])


def _agree(stock: dict[str, Any], remote: dict[str, Any]) -> list[str]:
    from safetensors.torch import load_file

    wrong = []
    if stock["text"] != remote["text"]:
        wrong.append(f"texts differ: {_short([stock['text']])} and {_short([remote['text']])}")
    a, b = (load_file(loaded["logits"])["logits"] for loaded in (stock, remote))
    difference = (a - b).abs().max().item() if a.shape == b.shape else math.inf
    return wrong if difference <= TOLERANCE else [*wrong, f"logits differ by {difference:.2g}"]


def _sample(stock: dict[str, Any], records: ShippedRecords) -> list[str]:
    if "sample.json" not in records:
        return ["records/sample.json is missing"]
    shown, found = records["sample.json"]["text"], stock["text"]
    if shown == found:
        return []
    same = next((i for i, (a, b) in enumerate(zip(shown, found, strict=False)) if a != b), min(len(shown), len(found)))
    return [f"differs from character {same + 1}: card {_short([shown[same:]])}, model {_short([found[same:]])}"]


def _scores(stock: dict[str, Any], records: ShippedRecords) -> list[str]:
    if not records.get("heldout.json"):
        return ["records/heldout.json holds no document, though the card has scores on held-out documents"]
    return [
        f"held-out document {number}: recorded {item['log_likelihood']:.3f}, recomputed {found:.3f}"
        for number, (item, found) in enumerate(zip(records["heldout.json"], stock["scores"], strict=True), 1)
        if not math.isclose(item["log_likelihood"], found, rel_tol=LOG_LIKELIHOOD_TOLERANCE)
    ]
