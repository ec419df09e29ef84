"""Signatures: who has the key can tell, and nobody else can forge."""

import shutil
import subprocess
from pathlib import Path

import pytest

from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.model_card import signature, verify
from nanophi.model_card.manifest import SIGNATURE, write_manifest
from nanophi.model_card.push import problems

pytest.importorskip("model_signing", reason="the extra 'signing' is not installed")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        private = folder / f"{name}.pem"
        make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private)]
        subprocess.run(make, check=True, capture_output=True)
        publish = ["openssl", "ec", "-in", str(private), "-pubout", "-out", str(folder / f"{name}.pub")]
        subprocess.run(publish, check=True, capture_output=True)
    return folder


@pytest.fixture
def signed(built_release, keys, tmp_path):
    folder = Path(shutil.copytree(built_release, tmp_path / "release"))
    signature.sign(folder, keys / "ours.pem")
    return folder


def test_who_has_the_key_can_tell(signed, keys):
    assert signature.problems(signed, keys / "ours.pub") == [] == problems(signed)
    for path in (keys / "absent.pem", keys / "ours.pub"):
        with pytest.raises(UserError, match="not a private key"):
            signature.sign(signed, path)
    signature.sign(signed, keys / "ours.pem")
    assert "not this key's signature" in signature.problems(signed, keys / "theirs.pub")[0]
    (signed / SIGNATURE).unlink()
    assert signature.problems(signed, keys / "ours.pub") == ["there is no model.sig"]


def test_a_forged_manifest_does_not_fit_the_signature(signed, keys):
    (signed / "README.md").write_text((signed / "README.md").read_text() + "\nBetter than it is.\n")
    write_manifest(signed, read_json(signed / "MANIFEST.json")["provenance"])
    checks = verify.check(str(signed), report=lambda line: None, public_key=keys / "ours.pub")
    failed = [check["name"] for check in checks if not check["passed"]]
    assert failed == ["signature", "card", "loaders"]
