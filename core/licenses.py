"""What a recipe's card section may say, so that nothing in it stops the card or the push after the training."""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from nanophi.core.names import is_hub_id

HUB_LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community
    h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql
    unknown unlicense wtfpl zlib
    """.split()  # noqa: SIM905
)
"""https://huggingface.co/docs/hub/repositories-licenses"""


def unlisted(license_id: object) -> str:
    """What is wrong with an identifier that is not in the Hub's list; empty for one that is."""
    if license_id in HUB_LICENSES:
        return ""
    near = str(license_id).lower().replace(" ", "-")
    hint = f"did you mean '{near}'?" if near in HUB_LICENSES else "use 'other' with license_name and license_link"
    return f"license {license_id!r} is not an identifier of the Hub; {hint}"


def license_problem(license_id: object, name: object = None, link: object = None) -> str | None:
    """What is wrong with a card's `license`, `license_name` and `license_link`, which `other` needs, in one line."""
    given = {"license_name": name, "license_link": link}
    if license_id == "other" and (missing := [key for key, value in given.items() if not value]):
        return f"license 'other' needs {' and '.join(missing)}"
    if license_id in HUB_LICENSES - {"other"} and (extra := [key for key, value in given.items() if value]):
        return f"{' and '.join(extra)} may only be given with license 'other', not {license_id!r}"
    return unlisted(license_id) or None


def card_problems(card: Mapping[str, Any]) -> Iterator[tuple[object, str]]:
    """What must not be true of a card section, and what is wrong then, beginning with the key."""
    for key in ("title", "developers", "license_name", "license_link", "prompt", "notes"):
        text = card[key] or ""
        yield key != "notes" and card[key] is not None and not text.strip(), f"{key} must not be empty"
        yield key not in ("notes", "prompt") and len(text.splitlines()) > 1, f"{key} must be one line"
        odd = any(unicodedata.category(one) in ("Cc", "Cs") for one in text if one not in "\n\t\r")
        yield odd, f"{key} must not have control characters"
    link, repo_id, version = card["license_link"], card["repo_id"], card["version"]
    yield link and not re.fullmatch(r"https?://[^\s<>\"]+", link), "license_link must be a URL (https://...)"
    yield repo_id is not None and not is_hub_id(repo_id), f"repo_id must be ORG/NAME, as on the Hub, got {repo_id!r}"
    wrong_tag = ".." in version or version.endswith((".", ".lock"))
    yield wrong_tag, "version must be the name of a git tag: no '..', and no '.' or '.lock' at its end"
    problem = license_problem(card["license"], card["license_name"], link)
    yield problem, str(problem)
