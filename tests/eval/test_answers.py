"""Which answers end by themselves, said in text that lm-eval's tasks can read."""

from types import SimpleNamespace

import pytest
import torch
from chat_run import make_base
from transformers import AutoTokenizer

from nanophi.eval.generation import NOT_ENDED, mark_not_ended
from nanophi.eval.measure import _data_hashes
from nanophi.eval.models import load_model
from nanophi.eval.scorer import ScorerLM
from nanophi.eval.tasks import answers


def test_rows_that_do_not_end_are_marked(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_base(tmp_path / "base") / "checkpoints/step-000001")
    end, text = tokenizer.eos_token_id, tokenizer("ab").input_ids
    # The prompt's own end-of-text does not count.
    rows = torch.tensor([[end, *text, end, end], [end, *text, *text]])
    marked = mark_not_ended(rows, 1, tokenizer)
    texts = [tokenizer.decode(row[1:], skip_special_tokens=True) for row in marked]
    assert texts == ["ab", "abab" + NOT_ENDED]
    assert [answers.ended({}, [text])["ended"] for text in texts] == [1.0, 0.0]
    assert answers.bits({"answer": "né"}, [(-3.0, False)]) == {"bits_per_byte": (-3.0, 3)}


def test_an_answer_costs_what_its_own_tokens_cost(tmp_path):
    """lm-eval would move the line end at the end of the prompt, a token of the template, to the answer."""
    network, tokenizer, _ = load_model(make_base(tmp_path / "base") / "checkpoints/step-000001")
    lm = ScorerLM(network, tokenizer, 4)
    pairs = [("User:\nWhy?\nAssistant:\n", "Because."), ("User:\nHow?\nAssistant:\n", "né")]
    requests = [SimpleNamespace(args=pair, task_name="answers_bits_per_byte") for pair in pairs]
    for (prompt, answer), (found, _) in zip(pairs, lm.loglikelihood(requests), strict=True):
        asked, said = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer))
        ids = torch.tensor([asked + said])
        expected = network(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-len(said) :].sum()
        assert found == pytest.approx(expected.item(), abs=1e-4)
    plain = [SimpleNamespace(args=pair, task_name="another") for pair in pairs]
    assert lm.loglikelihood(plain)[0][0] < lm.loglikelihood(requests)[0][0] - 0.1, "as lm-eval cuts other tasks"


def test_results_depend_on_the_conversations_and_on_the_documents(tmp_path):
    conversations, documents = tmp_path / "conversations", tmp_path / "documents"
    datasets = {"heldout_order": ("heldout", documents), "answers_ended": ("answers", conversations)}
    for folder, name in ((conversations, "heldout.parquet"), (documents, "heldout-00000.parquet")):
        folder.mkdir()
        (folder / name).write_text("1")
    before = _data_hashes(SimpleNamespace(datasets=datasets))
    assert set(before) == {"heldout", "answers"}
    (conversations / "heldout.parquet").write_text("2")
    after = _data_hashes(SimpleNamespace(datasets=datasets))
    assert after["heldout"] == before["heldout"] and after["answers"] != before["answers"]
