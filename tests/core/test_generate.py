"""`nanophi generate`: what cannot be continued is refused in one line."""

import pytest
from chat_run import make_base

from nanophi.core.errors import UserError
from nanophi.core.generate import generate


@pytest.fixture
def model(tmp_path):
    return make_base(tmp_path / "base") / "checkpoints/step-000001"


def test_a_prompt_is_continued_and_bytes_that_are_no_text_are_refused(model, capsys):
    generate(str(model), "A ü", 4, 0, 0)
    assert capsys.readouterr().out.startswith("A ü")
    with pytest.raises(UserError, match=r"^the prompt is not valid UTF-8$"):
        generate(str(model), b"\xff\xfe".decode(errors="surrogateescape"), 4, 0, 0)


def test_weights_that_are_cut_off_are_named(model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"^{model} cannot be loaded \(.+\)$"):
        generate(str(model), "A", 4, 0, 0)
