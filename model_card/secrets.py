"""What must not be published: credentials, and paths of the machine that made a run."""

import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SECRETS = {
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    "a GitHub token": re.compile(rb"\b(ghp|gho|ghs|ghu|github_pat)_[A-Za-z0-9_]{30,}"),
    "an AWS key": re.compile(rb"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    # Digits and capitals too: names of classes in style sheets begin alike.
    "an OpenAI or Anthropic key": re.compile(rb"\bsk-(?=[\w-]*[0-9])(?=[\w-]*[A-Z])[A-Za-z0-9_-]{24,}"),
    "a Google key": re.compile(rb"\bAIza[0-9A-Za-z_-]{35}"),
    "a Slack token": re.compile(rb"\bxox[abprs]-[0-9A-Za-z-]{20,}"),
    "a Weights & Biases key": re.compile(rb"WANDB_API_KEY\W{1,3}[0-9a-f]{40}"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
_KEY_WITH_DATA = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----(\s|\\[nr])*(Proc-Type|[A-Za-z0-9+/=]{4})")
MOST_NAMED = 5  # documents of a file that an error names
_SECRET_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)$")
_TOKENIZER_VARIABLE = re.compile(r"(^|_)(BOS|EOS|EOT|PAD|UNK|SEP|CLS|MASK|START|STOP|END|SPECIAL)_TOKEN$")
# No space, quote, angle or square bracket (as in `<|endoftext|>`, `[PAD]`), and more than one word or number.
_SECRET_VALUE = re.compile(r"(?![A-Za-z]+$)(?![\d.]+$)[!#-;=?-Z^-z~]{12,}")
# A string that is a path as a whole, perhaps behind `model:`; not `https://...`.
_PATH = re.compile(
    r"(?P<scheme>[A-Za-z]{2,}:(?!//))?(?P<path>~?[\\/].*|~\w+[\\/].*|[A-Za-z]:[\\/].*|\.\.[\\/].*)", re.DOTALL
)
# A path of two parts or more to the end of a longer string: `dir=/home/me/some where`.
_INNER_PATH = r"(?<=[=\s:,(])(?:~|[A-Za-z]:)?[\\/](?=[^\s\\/])[^\"\n]*?[\\/][^\"\n]*"


def found_in(content: str | bytes, folders: Iterable[Path] = (), document: bool = False) -> list[str]:
    """What in a text must not be published, in words: the kind of a secret, never the secret; or a path.

    The paths of `folders` are private too. A `document` is somebody's text, which may show how a key begins and name
    folders that many machines have: there a key counts with its first characters, and a path if it leads somewhere.
    """
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    kinds = SECRETS | ({"a private key": _KEY_WITH_DATA} if document else {})
    found = [kind for kind, pattern in kinds.items() if pattern.search(data)]
    if any(value in data for value in _environment_secrets()):
        found.append("a secret of this machine's environment")
    roots = _roots(folders, document)
    for match in _machine_paths(roots, document).finditer(data):
        path = match.group()
        if not document or path in roots or (path.count(b"/") > 2 and os.path.exists(path)):  # noqa: PTH110 (bytes)
            return [*found, f"a path of this machine ({path.decode(errors='replace')})"]
    return found


def found_in_file(path: Path, folders: Iterable[Path] = ()) -> list[str]:
    """The same of a file: of weights the header, of parquet every text, with the document that must not be sent."""
    if path.suffix == ".parquet":
        return list(itertools.islice(_found_in_parquet(path, list(folders)), MOST_NAMED))
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else -1
        return found_in(file.read(size), folders)


def _found_in_parquet(path: Path, folders: list[Path]) -> Iterator[str]:
    # RE2 reads a corpus as fast as it is decompressed, but knows no look-ahead: it finds what is worth a second look.
    simple = [re.sub(rb"\(\?=[^)]*\)|\\b", b"", pattern.pattern) for pattern in SECRETS.values()]
    literal = map(re.escape, (*_environment_secrets(), *_roots(folders, document=True)))
    suspect = b"|".join([*simple, *literal]).decode("utf-8", "replace")
    with pq.ParquetFile(path) as file:
        texts = [field.name for field in file.schema_arrow if field.type in (pa.string(), pa.large_string())]
        for batch in file.iter_batches(batch_size=512):
            for name in texts:
                column = batch[name]
                for row in np.flatnonzero(pc.match_substring_regex(column, suspect).to_numpy(zero_copy_only=False)):
                    where = batch["id"][int(row)].as_py()[:16] if "id" in batch.schema.names else str(row)
                    for kind in found_in(column[int(row)].as_py(), folders, document=True):
                        yield f"{kind} in the {name} of document {where}"


def _environment_secrets() -> list[bytes]:
    """Values of environment variables that are called like a secret and can be one."""
    named = [name for name in os.environ if _SECRET_VARIABLE.search(name) and not _TOKENIZER_VARIABLE.search(name)]
    values = [os.environ[name] for name in named if _SECRET_VALUE.fullmatch(os.environ[name])]
    return [os.fsencode(value) for value in values if not Path(value).exists()]  # not the file that holds the token


def _roots(folders: Iterable[Path] = (), document: bool = False) -> set[bytes]:
    """Folders that exist on this machine only by accident of who uses it; a document may name the interpreter's."""
    roots = {Path.home(), Path.cwd(), *(folder.resolve().parent for folder in folders)}
    roots |= set() if document else {Path(sys.prefix), Path(__file__).parents[2]}
    return {os.fsencode(root) for root in roots if len(root.parts) > 1}


def _machine_paths(roots: Iterable[bytes], document: bool = False) -> re.Pattern[bytes]:
    """Matches the paths below these folders; one part alone (`/root`, `/tmp`) is a common word of documentation."""
    common, rare = (rb"/[^\s\"'`<>()\[\]{},;:]+", rb"(?![\w-])") if document else (rb"/[\w.]", b"")
    longest_first = sorted(roots, key=lambda root: (-root.count(b"/"), root))
    return re.compile(b"|".join(re.escape(root) + (common if root.count(b"/") < 2 else rare) for root in longest_first))


class PathRemover:
    """Copies a JSON-able value with its paths cut to their last parts; not-a-number and infinity become None."""

    # Keys whose values are texts, which stay as they are: a text may begin with a slash.
    TEXTS = frozenset(("text", "prompt", "notes", "title", "developers", "checkpoints"))

    def __init__(self, run: Path) -> None:
        self._within = re.compile(rf"{_INNER_PATH}|(?:{os.fsdecode(_machine_paths(_roots([run])).pattern)})[^\s\"']*")
        self._names: dict[str, str] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self(key): item if key in self.TEXTS else self(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self(item) for item in value]
        if isinstance(value, str):
            if whole := _PATH.fullmatch(value):
                return (whole["scheme"] or "") + self._name(whole["path"])
            return self._within.sub(lambda match: self._name(match.group()), value)
        return None if isinstance(value, float) and value - value != 0 else value

    def _name(self, path: str) -> str:
        if path not in self._names:
            windows = "\\" in path and "/" not in path
            last = (PureWindowsPath(path) if windows else PurePosixPath(path)).name or "folder"
            names = itertools.chain([last], (f"{last} ({number})" for number in itertools.count(2)))
            self._names[path] = next(name for name in names if name not in self._names.values())
        return self._names[path]
