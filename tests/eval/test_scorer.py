"""The scorer against lm-eval's own `HFLM`, on tiny random models of several architectures."""

import random

import numpy as np
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from nanophi import NanoPhiConfig, NanoPhiForCausalLM
from nanophi.eval import prefix_tree, scorer
from nanophi.eval.scorer import ScorerLM

SIZES = {"vocab_size": 512, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
SHAPE = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "phi": transformers.PhiConfig(**SHAPE, num_key_value_heads=2),
    "nanophi": NanoPhiConfig(**SHAPE, num_key_value_heads=2),
    "llama": transformers.LlamaConfig(**SHAPE, num_key_value_heads=1),
    "gpt_neox": transformers.GPTNeoXConfig(**SHAPE),
    "gpt2": transformers.GPT2Config(
        vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    ),
    "opt": transformers.OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=1),
    "gemma2": transformers.Gemma2Config(
        **SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=4096, final_logit_softcapping=2.0
    ),
    "mistral": transformers.MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=16),
    "gpt_neo": transformers.GPTNeoConfig(
        **SIZES, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=16
    ),
    "bloom": transformers.BloomConfig(
        vocab_size=512, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, seq_length=64
    ),
    "mamba": transformers.MambaConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    ),
}
SHARED = ("phi", "nanophi", "llama", "gpt_neox", "gpt2", "opt")


def network(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = NanoPhiForCausalLM(config) if name == "nanophi" else transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual initialisation, so that a token out of place shows.
            parameter.normal_(0, 0.3) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


WORDS = [*"abcdefgh", "and", "to", "is was", "it", "for", "with his", "they", "this", "from", "have", "one", "not"]


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


def shrink(monkeypatch, rows, pack, gain):
    """Several rows and kept prefixes, also at this size."""
    for module, name, value in (
        (scorer, "ROW_TOKENS", rows), (prefix_tree, "ROW_TOKENS", rows), (prefix_tree, "PACK_TOKENS", pack),
        (scorer, "MIN_GAIN", gain),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("name", CONFIGS)
def test_log_likelihoods_are_those_of_hflm(name, tokenizer, monkeypatch):
    shrink(monkeypatch, rows=48, pack=32, gain=24)
    monkeypatch.setattr(scorer, "MIN_STEM", 40)
    model = network(name)
    max_length = 64 if name in ("bloom", "mamba") else None
    ours, theirs = ScorerLM(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    ours._max_length = theirs._max_length = max_length
    assert (not ours.unshared_because) == (name in SHARED), ours.unshared_because
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


def test_one_sequence_per_document_and_logits_only_where_scored(tokenizer, monkeypatch):
    """What makes it fast, by counting: a document's context runs once, and the LM head sees scored places only."""
    monkeypatch.setattr(scorer, "PAD_TO", 1)  # these rows are hardly longer than what they would be filled up to
    model = network("phi")
    ours = ScorerLM(model, tokenizer)
    rng = random.Random(0)
    documents = [text(rng, 12) for _ in range(5)]
    asked = [Instance("loglikelihood", {}, (d, " " + w), 0) for d in documents for w in ("had not", "was", "for them")]
    tokens: list[int] = []
    head: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].numel()))
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: head.append(inputs[0].shape[1]))
    ours.loglikelihood(asked)
    contexts = sum(len(tokenizer.encode(document)) for document in documents)
    continuations = sum(len(tokenizer.encode(r.args[1])) for r in asked)
    assert sum(tokens) <= 1.5 * (contexts + continuations)
    assert sum(head) <= continuations
    stock = sum(len(tokenizer.encode("".join(r.args))) for r in asked)
    assert sum(tokens) < 0.6 * stock


def test_a_subjects_examples_run_once(tokenizer, monkeypatch):
    shrink(monkeypatch, rows=64, pack=64, gain=32)
    model = network("llama")
    ours = ScorerLM(model, tokenizer)
    rng = random.Random(0)
    shots = text(rng, 30)
    prompts = [f"{shots}\n\n{text(rng, 4)}\nAnswer:" for _ in range(30)]
    asked = [Instance("loglikelihood", {}, (prompt, choice), 0) for prompt in prompts for choice in (" a", " of")]
    tokens: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].numel()))
    ours.loglikelihood(asked)
    prefix = len(tokenizer.encode(shots))
    assert sum(tokens) < 2 * prefix + sum(len(tokenizer.encode(p)) - prefix for p in prompts) * 1.3


def test_greedy_generation_is_that_of_hflm(tokenizer):
    model = network("phi")
    ours = ScorerLM(model, tokenizer, batch_size=3)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    rng = random.Random(0)
    kwargs = {"until": [" this", "Q", " not"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}
    asked = [Instance("generate_until", {}, (text(rng, n), dict(kwargs)), 0) for n in (2, 5, 9, 30, 60, 80, 7)]
    steps: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: steps.append(1))
    found, ran = ours.generate_until(asked, disable_tqdm=True), len(steps)
    expected = theirs.generate_until(asked, disable_tqdm=True)
    handle.remove()
    assert found == expected
    assert any(found) and ran <= len(steps) - ran


@pytest.mark.parametrize("prompts", [["x"], ["x", "y", "z"], ["x", "the red one", "and so it was"]])
@pytest.mark.parametrize("beams", [{}, {"num_beams": 1}, {"num_beams": 2}])
def test_prompts_of_one_token_and_beams_are_generated_as_by_hflm(prompts, beams, tokenizer):
    model = network("phi")
    kwargs = {"until": [" this", " t", " not"], "max_gen_toks": 12, **beams}
    asked = [Instance("generate_until", {}, (prompt, dict(kwargs)), 0) for prompt in prompts]
    ours = ScorerLM(model, tokenizer, batch_size=4).generate_until(asked, disable_tqdm=True)
    assert ours == HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).generate_until(asked, disable_tqdm=True)
    assert any(ours)


def test_bfloat16_is_near_float32(tokenizer):
    model = network("phi")
    exact = ScorerLM(model, tokenizer).loglikelihood(requests())
    rounded = ScorerLM(model.to(torch.bfloat16), tokenizer)
    assert not rounded.unshared_because
    found = rounded.loglikelihood(requests())
    differences = [abs(a - b) / (1 + abs(a)) for (a, _), (b, _) in zip(exact, found, strict=True)]
    assert max(differences) < 0.05


def test_network_is_left_as_it_was(tokenizer):
    model = network("phi")
    ids = torch.arange(1, 20)[None]
    before = model(ids).logits
    ScorerLM(model, tokenizer).loglikelihood(requests())
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["phi", "mamba"])
def test_what_cannot_be_scored_is_refused(name, tokenizer):
    ours = ScorerLM(network(name), tokenizer)
    ours._max_length = 64
    with pytest.raises(scorer.NotScorable, match=r"an answer has [0-9]+ tokens, too many for a context of 64 tokens"):
        ours.loglikelihood([Instance("loglikelihood", {}, ("a", " the" * 70), 0)])
    with pytest.raises(scorer.NotScorable, match="the answer of an item is empty"):
        ours.loglikelihood([Instance("loglikelihood", {}, ("a the", ""), 0)])
    with pytest.raises(scorer.NotScorable, match="the prompt of an item is empty"):
        ours.loglikelihood([Instance("loglikelihood", {}, (" ", "the"), 0)])


class Quantized(torch.Tensor):
    """Weights in int8 as torchao keeps them: a class of their own, which knows only how to multiply."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=torch.float32)

    def __init__(self, weight):
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.codes = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            return function(args[0], args[1].codes * args[1].scale, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.detach.default, "nothing but a product"
        return args[0]


def test_quantized_weights_multiply_in_their_own_way(tokenizer):
    model = network("phi")
    for module in list(model.modules()):
        if type(module) is torch.nn.Linear and module is not model.get_output_embeddings():
            module.weight = torch.nn.Parameter(Quantized(module.weight.data), requires_grad=False)
    expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(requests(), disable_tqdm=True)
    found = ScorerLM(model, tokenizer).loglikelihood(requests())
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
