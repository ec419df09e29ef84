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


@pytest.mark.parametrize(("temperature", "seed"), [(0, 0), (1e-40, 0), (1e-7, 2**40), (0.8, 2**40), (1e30, 2**63)])
def test_any_temperature_and_seed_give_a_text(model, capsys, temperature, seed):
    """Of a run's folder too, which stands for its last checkpoint."""
    texts = []
    for name in (model, model.parents[1]):
        generate(str(name), "A ", 4, temperature, seed)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("A ")


def test_weights_that_are_cut_off_and_a_seed_of_more_than_64_bits_are_named(model):
    with pytest.raises(UserError, match=rf"^--seed {2**70} cannot be used"):
        generate(str(model), "A ", 4, 0.8, 2**70)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"^{model} cannot be loaded \(.+\)$"):
        generate(str(model), "A", 4, 0, 0)
