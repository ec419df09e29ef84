"""The scorer against lm-eval's own `HFLM`, on tiny random models of several architectures."""

import random

import numpy as np
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nanophi import NanoPhiConfig, NanoPhiForCausalLM
from nanophi.eval import scorer
from nanophi.eval.scorer import ScorerLM

WORDS = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "is",
    "was",
    "it",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
    "be",
    "this",
    "from",
    "have",
    "or",
    "by",
    "one",
    "had",
    "not",
]
SIZES = {"vocab_size": 320, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
SHAPE = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "phi": transformers.PhiConfig(**SHAPE, num_key_value_heads=2),
    "nanophi": NanoPhiConfig(**SHAPE, num_key_value_heads=2),
    "llama": transformers.LlamaConfig(**SHAPE, num_key_value_heads=1),
    "gpt_neox": transformers.GPTNeoXConfig(**SHAPE),
    "gpt2": transformers.GPT2Config(
        vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    ),
    "opt": transformers.OPTConfig(
        **SIZES,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        pad_token_id=1,
    ),
    "gemma2": transformers.Gemma2Config(
        **SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=4096, final_logit_softcapping=2.0
    ),
    "mistral": transformers.MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=16),
    "gpt_neo": transformers.GPTNeoConfig(
        **SIZES, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=16
    ),
    "bloom": transformers.BloomConfig(
        vocab_size=320, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, seq_length=64
    ),
    "mamba": transformers.MambaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    ),
}
SHARED = ("phi", "nanophi", "llama", "gpt_neox", "gpt2", "opt")


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def network(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = NanoPhiForCausalLM(config) if name == "nanophi" else transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual initialisation, so that a token out of place shows.
            parameter.normal_(0, 0.3) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def requests() -> list[Instance]:
    """Choices of several documents: with their own contexts, a long common prefix, none; some overflow 64 tokens."""
    rng = random.Random(0)
    shots = text(rng, 30)
    pairs = []
    for words in (3, 10, 20, 45, 60, 75, 90):
        context = text(rng, words)
        pairs += [(context, " " + text(rng, rng.randint(1, 9))) for _ in range(4)]
    for _ in range(12):
        context = f"{shots}\n\n{text(rng, rng.randint(2, 12))}\nAnswer:"
        pairs += [(context, choice) for choice in (" a", " the", " of", " had not")]
    pairs += [(f"{shots} {option} {text(rng, 3)} ", " it was") for option in ("one", "they")]
    pairs += [("", " " + text(rng, 5)), ("", "<|endoftext|>the"), pairs[0], (pairs[0][0] + " the", " a")]
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


@pytest.mark.parametrize("name", CONFIGS)
def test_log_likelihoods_are_those_of_hflm(name, tokenizer, monkeypatch):
    monkeypatch.setattr(scorer, "ROW_TOKENS", 48)  # several rows and kept prefixes, also at this size
    monkeypatch.setattr(scorer, "PACK_TOKENS", 32)
    monkeypatch.setattr(scorer, "MIN_GAIN", 24)
    model = network(name)
    max_length = 64 if name in ("bloom", "mamba") else None
    ours, theirs = ScorerLM(model, tokenizer, progress=False), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    ours._max_length = theirs._max_length = max_length
    assert (not ours.sharing) == (name in SHARED), ours.sharing
    expected = theirs.loglikelihood(requests(), disable_tqdm=True)
    found = ours.loglikelihood(requests(), disable_tqdm=True)
    assert ours.overflowing >= 8
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    documents = [
        Instance("loglikelihood_rolling", {}, (text(random.Random(i), n),), 0) for i, n in enumerate((1, 30, 150))
    ]
    found, expected = ours.loglikelihood_rolling(documents, True), theirs.loglikelihood_rolling(documents, True)
    np.testing.assert_allclose(found, expected, atol=2e-3)
