"""One release under old and new transformers: the same tokens, logits and answers to messages with both loaders.

    python tests/compat/run.py [RELEASE ...]        (make compat RELEASE=runs/demo/release)

Each version has an environment of its own under .venv/compat/, made when it is missing (about 40 seconds and 1.1 GB
each); the newest is the one that runs this. The loaders are stock Phi and the release's own code, each in a fresh
process. Without a RELEASE some small ones are built here, which between them use every field of the configuration.
Exit status 1 and one line per failure if anything differs from stock Phi in the newest version.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nanophi
from nanophi.core.files import read_json, write_json

ROOT = Path(nanophi.__file__).parent.resolve()
ENVIRONMENTS = ROOT / ".venv" / "compat"
VERSIONS = {
    "4.37.2": ["transformers==4.37.2", "tokenizers<0.19", "numpy<2", "torch==2.13.0"],
    "4.57.6": ["transformers==4.57.6", "huggingface_hub<1", "torch==2.13.0"],
}
"""The oldest transformers that stock loading is promised for, the last of version 4, and what they need."""

TOO_OLD = "ImportError: NanoPhi's own code needs transformers 5.4.0 or later, found {}"
NO_QK_LAYERNORM = "RuntimeError: Given normalized_shape="
"""Phi of transformers before 4.48 normalises queries before it has split them into heads, and fails by itself."""

TOLERANCE = 1e-4
"""Largest absolute difference of logits, float32 on the CPU."""

TEXTS = [
    "The quick brown fox jumps over the lazy dog; it'll do so 1,234 times.\n\n    def fox(dog: int = 0) -> None:\n"
    "\t\treturn 'naïve café' # Größe, 北京, Ωμέγα, 🦊   and  spaces   \n" * 4,
    "The function returns",
    "A module is",
    "  If x is None:\n",
]
"""The logits are compared on the first; the others are continued greedily."""


def environment(version: str) -> Path:
    """The Python of a version's environment, which is made if it is missing or was not finished."""
    folder = ENVIRONMENTS / version
    python, done = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join(VERSIONS[version])
    if not done.is_file() or done.read_text() != wanted:
        print(f"making {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *VERSIONS[version]], check=True)
        done.write_text(wanted)
    return python


def small_releases(folder: Path) -> dict[str, Path]:
    """Releases with random weights and a trained tokenizer, made by the release's own code."""
    from pydoc_data.topics import topics

    import pandas as pd
    import torch
    from transformers.utils.logging import disable_progress_bar

    from nanophi import NanoPhiConfig, NanoPhiForCausalLM
    from nanophi.core.recipe import Tokenizer
    from nanophi.data import tokenizer
    from nanophi.data.conversations import TEMPLATE
    from nanophi.model_card import release

    disable_progress_bar()
    documents = folder / "documents"
    documents.mkdir()
    table = pd.DataFrame({"id": [f"{number:016x}" for number in range(len(topics))], "text": list(topics.values())})
    for split, rows in (("train", table[5:]), ("heldout", table[:5])):
        rows.assign(source="topics").to_parquet(documents / f"{split}-00000.parquet")
    tokenizer.build(documents, Tokenizer(vocab_size=1000), 0, folder / "tokenizer")

    shape: dict[str, Any] = {"vocab_size": 1000, "num_hidden_layers": 3, "bos_token_id": 0, "eos_token_id": 0}
    shape |= {"max_position_embeddings": 256, "hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 6}
    rope = {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.75}
    other = {"tie_word_embeddings": True, "layer_norm_eps": 1e-6, "rope_parameters": rope}
    variants: dict[str, tuple[dict[str, Any], str]] = {
        "grouped": ({"num_key_value_heads": 2}, "float32"),
        "linear": ({"num_key_value_heads": 2, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "float32"),
        "qk-layernorm": ({"num_key_value_heads": 6, "qk_layernorm": True}, "float32"),
        "other": ({"num_key_value_heads": 1, **other}, "bfloat16"),
    }
    config = read_json(folder / "tokenizer" / "tokenizer_config.json")
    write_json(folder / "tokenizer" / "tokenizer_config.json", {**config, "chat_template": TEMPLATE})
    run, card = folder / "run", folder / "card"
    hashes = {"sha256": "0" * 64}
    write_json(run / "record.json", {"environment": {}, "stages": {}})
    write_json(run / "data" / "tokens" / "tokens.json", {"train": hashes, "heldout": hashes})
    write_json(card / "records" / "revisions.json", [])
    write_json(card / "records" / "run.json", {})
    (card / "records" / "recipe.yaml").write_text("card: {license: apache-2.0}")
    releases = {}
    for name, (fields, dtype) in variants.items():
        torch.manual_seed(0)
        model = NanoPhiForCausalLM(NanoPhiConfig(**shape, **fields))
        for parameter in model.parameters():  # biases and norms too: none may be lost without a difference
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
        checkpoint = folder / name
        model.save_pretrained(checkpoint)
        for file in (folder / "tokenizer").iterdir():
            (checkpoint / file.name).write_bytes(file.read_bytes())
        releases[name] = folder / f"{name}-release"
        release.build(run, checkpoint, card, releases[name], dtype)
    return releases


def load(python: Path, trust: bool, releases: dict[str, Path], scratch: Path) -> dict[str, Any]:
    """Answers by release from a fresh process with an empty cache and no access to this checkout."""
    scratch.mkdir()
    wanted = {
        name: {"folder": str(folder), "logits": str(scratch / f"{number}.safetensors")}
        for number, (name, folder) in enumerate(releases.items())
    }
    request = {"trust": trust, "texts": TEXTS, "answer": str(scratch / "answer.json"), "releases": wanted}
    write_json(scratch / "request.json", request)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "TRANSFORMERS_"))}
    kept |= {"HF_HOME": str(scratch), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(python), "-I", str(Path(__file__).with_name("load.py")), str(scratch / "request.json")]
    done = subprocess.run(command, cwd=scratch, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        return {"error": (done.stdout.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    answers = read_json(scratch / "answer.json")
    for name, answer in answers["releases"].items():
        answer["logits"] = wanted[name]["logits"]
    return answers


def problems(answer: dict[str, Any], reference: dict[str, Any], folder: Path, trust: bool) -> tuple[list[str], float]:
    """What is wrong with one loader's answer, and the largest difference of its logits from the reference's."""
    import torch
    from safetensors.torch import load_file

    if "error" in answer:
        return [answer["error"]], float("nan")
    if "error" in reference:
        return ["nothing to compare with"], float("nan")
    wrong = [f"{key}: {', '.join(value[:3])}" for key, value in answer["loading"].items()]
    expected = ("NanoPhiForCausalLM", "transformers_modules") if trust else ("PhiForCausalLM", "transformers")
    if (answer["class"], answer["module"]) != expected:
        wrong.append(f"loaded {answer['module']}.{answer['class']}, expected {'.'.join(expected[::-1])}")
    if answer["uses_nanophi"]:
        wrong.append("the installed nanophi was imported")
    wrong += frequency_problems(answer["frequencies"], read_json(folder / "config.json"))
    same = ("ids", "decoded", "generated", *(["answer"] if answer["answer"] is not None else []))
    wrong += [f"{key}: {answer[key]}, not {reference[key]}" for key in same if answer[key] != reference[key]]
    a, b = (load_file(one["logits"])["logits"].double() for one in (answer, reference))
    difference = torch.dist(a, b, float("inf")).item() if a.shape == b.shape else float("inf")
    if not difference <= TOLERANCE:
        wrong.append(f"logits differ by {difference:.2g}")
    return wrong, difference


def expected_refusal(version: str, trust: bool, folder: Path) -> str:
    """How the error begins that an old version must answer with instead of a wrong model; empty: it must work."""
    if version in VERSIONS and trust:
        return TOO_OLD.format(version)
    if version == "4.37.2" and read_json(folder / "config.json").get("qk_layernorm"):
        return NO_QK_LAYERNORM
    return ""


def frequency_problems(found: dict[str, list[float]], config: dict[str, Any]) -> list[str]:
    """RoPE's inverse frequencies, `theta ** (-2i / d)`, are in no checkpoint: a loader may leave garbage in them.

    Linear scaling divides them by its factor.
    """
    scale = (config.get("rope_scaling") or {"factor": 1})["factor"]
    dimensions = int(config["hidden_size"] // config["num_attention_heads"] * config["partial_rotary_factor"])
    expected = [config["rope_theta"] ** (-i / dimensions) / scale for i in range(0, dimensions, 2)]
    if not found:
        return ["no RoPE frequencies found"]
    return [
        f"{name} is {values[:3]}, expected {expected[:3]}"
        for name, values in found.items()
        if len(values) != len(expected) or any(abs(a / b - 1) > 1e-5 for a, b in zip(values, expected, strict=True))
    ]


def main() -> None:
    failures: list[str] = []
    pythons = {version: environment(version) for version in VERSIONS}
    with tempfile.TemporaryDirectory(prefix="nanophi-compat-") as folder:
        scratch = Path(folder)
        releases = {path: Path(path).resolve() for path in sys.argv[1:]} or small_releases(scratch)
        for name, path in releases.items():
            if not (path / "config.json").is_file():
                sys.exit(f"compat: {name} is no release folder (config.json is missing)")
        print(f"{'transformers':<14}{'loader':<13}{'release':<28}{'logits differ by':<18}result")
        loaders = [("newest", Path(sys.executable), False), ("newest", Path(sys.executable), True)]
        loaders += [(version, python, trust) for version, python in pythons.items() for trust in (False, True)]
        reference: dict[str, Any] = {}
        for version, python, trust in loaders:
            loader = "remote code" if trust else "stock Phi"
            answers = load(python, trust, releases, scratch / f"{version}-{trust}")
            found = version if "error" in answers else answers["versions"]["transformers"]
            reference = reference or answers
            if "error" in reference:
                sys.exit(f"compat: newest transformers, stock Phi: {reference['error']}")
            for name, path in releases.items():
                answer = {"error": answers["error"]} if "error" in answers else answers["releases"][name]
                wrong, difference = problems(answer, reference["releases"][name], path, trust)
                result = f"same tokens ({answer.get('class')})"
                if refusal := expected_refusal(version, trust, path):
                    message = answer.get("error", "none")
                    wrong = [] if message.startswith(refusal) else [f"expected '{refusal}', got '{message}'"]
                    result = f"refused, as it must be: {refusal.split(':')[0]}"
                failures += [f"transformers {found}, {loader}, {name}: {line}" for line in wrong]
                shown = "" if difference != difference else f"{difference:.1e}"
                print(f"{found:<14}{loader:<13}{name[-26:]:<28}{shown:<18}{'FAILED' if wrong else result}", flush=True)
    for failure in failures:
        print(f"compat: {failure}", file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
