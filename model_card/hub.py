"""Hub reads, retries, and error messages in one line with their remedy. What is sent is decided in `upload.py`."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, RepoFile
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from nanophi.core.errors import UserError
from nanophi.core.inputs import Kind

Result = TypeVar("Result")

ATTEMPTS = 5
LONGEST_WAIT = 300
"""Seconds; a server that asks for more is reported, not waited for."""

RESUME = "run the same command to resume"


@contextlib.contextmanager
def one_line_errors(repo_id: str) -> Iterator[None]:
    """Errors of the client and the connection become a `UserError`: what the Hub answered, and the remedy."""
    from httpx2 import HTTPError

    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError("no token for the Hub; run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        raise UserError(f"{repo_id}: {_explain(error)}") from None
    except (HTTPError, OSError, RuntimeError) as error:
        # The client raises RuntimeError when an upload fails, and LocalEntryNotFoundError when there is no answer.
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise UserError(f"{repo_id}: {_explain(cause)}") from None
        if isinstance(error, RuntimeError) and not isinstance(cause, HTTPError | OSError):
            raise
        reason = str(cause or error).splitlines() or [type(error).__name__]
        raise UserError(f"{repo_id}: the connection failed ({reason[0]}); {RESUME}") from None


def _explain(error: HfHubHTTPError) -> str:
    status, text = error.response.status_code, " ".join(str(error).split())
    if _is_temporary(status):
        return f"the Hub is busy ({status}: {error.server_message or text}); {RESUME}"
    return {
        401: "the Hub does not accept the token, or does not show this repository to it; run `hf auth login`",
        403: f"the Hub refuses: {text}",
        412: f"somebody else committed there at the same time; look at the repository, then {RESUME}",
    }.get(status, f"the Hub answered: {text}")


def _is_temporary(status: int) -> bool:
    return status == 429 or status >= 500


def with_retries(call: Callable[[], Result], report: Callable[[str], None]) -> Result:
    """The result of a call to the Hub, made again after the time that a busy server asks for (429 and 5xx).

    The client has retries of its own for lists and for the upload of large files, but for nothing else.
    """
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except HfHubHTTPError as error:
            status, headers = error.response.status_code, error.response.headers
            limit = parse_ratelimit_headers(headers) if status == 429 else None
            wait = limit.reset_in_seconds + 1 if limit else 2**attempt
            wait = int(asked) if (asked := headers.get("Retry-After", "")).isdigit() else wait
            if not _is_temporary(status) or attempt == ATTEMPTS - 1 or wait > LONGEST_WAIT:
                raise
            report(f"the Hub is busy ({status}); trying again in {wait} s")
        time.sleep(wait)
    raise AssertionError("unreachable")


class RetryingApi(HfApi):
    """The client, with retries for what it sends and for single objects that it asks for."""

    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__()
        self._report = report

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith(("create_", "add_", "update_", "get_")):
            return found
        return lambda *args, **options: with_retries(functools.partial(found, *args, **options), self._report)


def branches_and_tags(api: HfApi, repo_id: str, kind: Kind = "model") -> tuple[dict[str, str], dict[str, str]] | None:
    """Name -> commit of a repository's branches and tags; None if there is no such repository for this token."""
    try:
        refs = api.list_repo_refs(repo_id, repo_type=kind)
    except RepositoryNotFoundError:
        return None
    branches, tags = ({entry.name: entry.target_commit for entry in group} for group in (refs.branches, refs.tags))
    return branches, tags


def files_at(api: HfApi, repo_id: str, revision: str, kind: Kind = "model") -> dict[str, RepoFile]:
    """Path -> file of a revision, without `.gitattributes`, which is the Hub's own."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=kind)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile) and entry.path != ".gitattributes"}


def read_file(api: HfApi, repo_id: str, path: str, revision: str, folder: Path, kind: Kind = "model") -> bytes | None:
    """A file's contents; None if it is not there. `folder` takes the download."""
    try:
        return Path(
            api.hf_hub_download(repo_id, path, revision=revision, cache_dir=folder, repo_type=kind)
        ).read_bytes()
    except LocalEntryNotFoundError:
        raise  # No answer at all, though it is called like a missing file.
    except (EntryNotFoundError, RevisionNotFoundError):
        return None
