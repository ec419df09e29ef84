"""Which answers end by themselves, said in text that lm-eval's tasks can read."""

import torch
from chat_run import make_base
from transformers import AutoTokenizer

from nanophi.eval.generation import NOT_ENDED, mark_not_ended
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
