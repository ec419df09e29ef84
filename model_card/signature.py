"""A detached signature over a release, with `model-signing` (the optional extra `signing`).

The manifest says that the files belong together; the signature says whose they are. Keys are PEM files on an elliptic
curve: `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`, `openssl ec -in key.pem -pubout -out key.pub`.
"""

import importlib
from pathlib import Path
from typing import Any

from nanophi.core.errors import UserError, one_line, user_errors
from nanophi.model_card.manifest import SIGNATURE


def sign(folder: Path, private_key: Path) -> None:
    """Write `model.sig`, a signature over every other file of the folder. `UserError` without the extra or a key."""
    library = _library()
    (folder / SIGNATURE).unlink(missing_ok=True)
    with user_errors(f"{private_key} is not a private key in PEM form"):
        config = library.signing.Config().use_elliptic_key_signer(private_key=private_key)
    config.set_hashing_config(_hashing(library, folder)).sign(folder, folder / SIGNATURE)


def problems(folder: Path, public_key: Path) -> list[str]:
    """Why the folder is not what the owner of the key signed, one line each; empty if it is."""
    library = _library()
    if not (folder / SIGNATURE).is_file():
        return [f"there is no {SIGNATURE}"]
    with user_errors(f"{public_key} is not a public key in PEM form"):
        config = library.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    try:
        config.set_hashing_config(_hashing(library, folder)).verify(folder, folder / SIGNATURE)
    except Exception as error:  # The library raises ValueError, and those of cryptography and of JSON.
        return [f"{SIGNATURE} is not this key's signature of these files ({one_line(error)})"]
    return []


def _library() -> Any:
    try:
        return importlib.import_module("model_signing")
    except ImportError:
        raise UserError("signatures need the extra 'signing': pip install 'nanophi[signing]'") from None


def _hashing(library: Any, folder: Path) -> Any:
    ignored = [folder / SIGNATURE, folder / ".cache"]
    # The Hub's cache is made of links.
    return library.hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=True).set_allow_symlinks(True)
