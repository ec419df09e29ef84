"""NanoPhi against transformers' PhiForCausalLM, an independent implementation: the same function, both ways.

Tiny random weights go into both; logits, loss, gradients and generated tokens must agree in float32.
"""

import pytest
import tiny_model
import torch
from tiny_model import TOLERANCE, assert_same_gradients, difference, gradients, tokens
from transformers import PhiConfig, PhiForCausalLM

from nanophi import NanoPhiConfig, NanoPhiForCausalLM

SHAPE = {**tiny_model.SHAPE, "hidden_size": 80, "eos_token_id": None, "pad_token_id": 0}


def make_pair(attention="sdpa", key_value_heads=2, rotary=0.5, qk_layernorm=False, tied=False, **fields):
    """The same random weights (biases and LayerNorms too) in Phi and in NanoPhi, both in eval mode."""
    fields = {**SHAPE, **fields, "num_key_value_heads": key_value_heads, "qk_layernorm": qk_layernorm}
    fields |= {"tie_word_embeddings": tied, "partial_rotary_factor": rotary, "attn_implementation": attention}
    torch.manual_seed(0)
    phi = PhiForCausalLM(PhiConfig(**fields)).eval()
    for parameter in phi.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    nanophi = NanoPhiForCausalLM(NanoPhiConfig(**fields)).eval()
    nanophi.load_state_dict(phi.state_dict(), strict=True)
    return phi, nanophi


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("qk_layernorm", [False, True], ids=["plain", "qk_layernorm"])
@pytest.mark.parametrize("rotary", [0.4, 0.5, 1.0])
@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_loss_and_gradients(attention, key_value_heads, rotary, qk_layernorm, tied):
    phi, nanophi = make_pair(attention, key_value_heads, rotary, qk_layernorm, tied)
    ids = tokens()
    labels = ids.clone()
    labels[0, :5] = -100
    expected, actual = phi(ids, labels=labels), nanophi(ids, labels=labels)
    assert difference(expected.logits, actual.logits) < TOLERANCE
    assert difference(expected.loss, actual.loss) < TOLERANCE
    assert (actual.past_key_values is None) == (expected.past_key_values is None)
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients(gradients(phi), gradients(nanophi))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_of_either_is_read_by_the_other(tmp_path, tied):
    phi, nanophi = make_pair(tied=tied)
    ids = tokens()
    nanophi.save_pretrained(tmp_path / "ours")
    phi.save_pretrained(tmp_path / "stock")
    for reader, folder in ((PhiForCausalLM, "ours"), (NanoPhiForCausalLM, "stock"), (NanoPhiForCausalLM, "ours")):
        model, info = reader.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert difference(model(ids).logits, phi(ids).logits) < TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_token_by_token_with_a_cache_equals_one_pass(attention):
    phi, nanophi = make_pair(attention)
    ids = tokens()
    whole = phi(ids).logits
    cache, steps = None, []
    for token in ids.split(1, dim=1):
        outputs = nanophi(token, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        steps.append(outputs.logits)
    assert difference(torch.cat(steps, dim=1), whole) < TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_left_padded_batch_equals_each_row_alone(attention):
    phi, nanophi = make_pair(attention)
    short, long = tokens(1, 6, seed=2), tokens(1, 11, seed=3)
    ids = torch.cat((torch.nn.functional.pad(short, (5, 0)), long))
    mask = (ids != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = nanophi(ids, attention_mask=mask, position_ids=positions).logits
    assert difference(batch[:1, 5:], phi(short).logits) < TOLERANCE
    assert difference(batch[1:], phi(long).logits) < TOLERANCE
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(nanophi.generate(ids, **arguments), phi.generate(ids, **arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "repetition_penalty": 10.0},
        {"do_sample": True, "top_k": 20},
    ],
    ids=lambda arguments: "-".join(f"{key}={value}" for key, value in arguments.items()),
)
def test_generate_gives_the_same_tokens(arguments):
    phi, nanophi = make_pair()
    ids = tokens(batch=1)
    outputs = []
    for model in (phi, nanophi):
        torch.manual_seed(3)
        outputs.append(model.generate(ids, max_new_tokens=20, **arguments))
    assert torch.equal(*outputs)
    assert outputs[0].shape[1] == ids.shape[1] + 20


def test_beyond_the_context_it_does_what_phi_does():
    """Rotary positions continue past max_position_embeddings: no error, and the same numbers."""
    phi, nanophi = make_pair(max_position_embeddings=16)
    ids = tokens(length=40)
    assert difference(phi(ids).logits, nanophi(ids).logits) < TOLERANCE
    assert torch.equal(*(model.generate(ids[:1], max_new_tokens=20, do_sample=False) for model in (phi, nanophi)))


ROPE = {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}
SCALED = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16}
    | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
]


@pytest.mark.parametrize("scaled", SCALED, ids=lambda rope: rope["rope_type"])
def test_scaled_rotary_embeddings_are_phis_however_they_arrive(tmp_path, scaled):
    """From the constructor, from a saved file, from an argument of from_pretrained, and assigned to a configuration."""
    rope = {**ROPE, **scaled}
    phi, nanophi = make_pair(max_position_embeddings=64)
    for name, parameter in phi.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            torch.nn.init.normal_(parameter, std=0.5)  # sharper attention, so that rotations matter
    nanophi.load_state_dict(phi.state_dict())
    ids = tokens(length=100)
    nanophi.save_pretrained(tmp_path / "plain")
    expected = PhiForCausalLM.from_pretrained(tmp_path / "plain", rope_parameters=dict(rope)).eval()(ids).logits
    assert difference(expected, phi(ids).logits) > 100 * TOLERANCE
    override = NanoPhiForCausalLM.from_pretrained(tmp_path / "plain", rope_parameters=dict(rope)).eval()
    assert difference(override(ids).logits, expected) < TOLERANCE
    override.save_pretrained(tmp_path / "scaled")
    assert difference(NanoPhiForCausalLM.from_pretrained(tmp_path / "scaled")(ids).logits, expected) < TOLERANCE
    config = NanoPhiConfig.from_pretrained(tmp_path / "plain")
    config.rope_parameters = dict(rope)
    configured = NanoPhiForCausalLM.from_pretrained(tmp_path / "plain", config=config)
    assert difference(configured(ids).logits, expected) < TOLERANCE
    # Short rows after long ones: "dynamic" goes back to the original frequencies.
    short = tokens(length=12)
    again = PhiForCausalLM.from_pretrained(tmp_path / "scaled").eval()
    for inputs in (ids, short):
        assert difference(override(inputs).logits, again(inputs).logits) < TOLERANCE


def test_a_wrong_field_is_refused_however_it_arrives(tmp_path):
    _, nanophi = make_pair()
    nanophi.save_pretrained(tmp_path)
    wrong = [
        ({"rope_parameters": {"rope_type": "lineal", **ROPE}}, "rope_type 'lineal' is unknown"),
        ({"num_key_value_heads": 3}, "use one of 1, 2, 4 key/value heads"),
    ]
    for fields, message in wrong:
        with pytest.raises(ValueError, match=message):
            NanoPhiForCausalLM.from_pretrained(tmp_path, **fields)
        with pytest.raises(ValueError, match=message):
            NanoPhiConfig.from_pretrained(tmp_path, **fields)
        config = NanoPhiConfig.from_pretrained(tmp_path)
        for name, value in fields.items():
            setattr(config, name, value)
        with pytest.raises(ValueError, match=message):
            NanoPhiForCausalLM(config)


def test_exported_with_dynamic_shapes_it_takes_other_shapes():
    phi, nanophi = make_pair()
    sizes = {0: torch.export.Dim("rows", min=1, max=8), 1: torch.export.Dim("tokens", min=2, max=64)}
    arguments = {"input_ids": tokens(), "use_cache": False}
    with torch.no_grad():
        shapes = {"input_ids": sizes, "use_cache": None}
        exported = torch.export.export(nanophi, (), arguments, dynamic_shapes=shapes).module()
        for rows, length in ((3, 30), (1, 5)):
            ids = tokens(rows, length)
            assert difference(exported(input_ids=ids, use_cache=False).logits, phi(ids).logits) < TOLERANCE


def test_hidden_states_and_attentions_are_phis():
    phi, nanophi = make_pair("eager")
    ids = tokens()
    expected, actual = (model(ids, output_hidden_states=True, output_attentions=True) for model in (phi, nanophi))
    assert (len(actual.hidden_states), len(actual.attentions)) == (3, 2)
    pairs = [(expected.hidden_states, actual.hidden_states), (expected.attentions, actual.attentions)]
    for first, second in ((a, b) for pair in pairs for a, b in zip(*pair, strict=True)):
        assert difference(first, second) < TOLERANCE


def test_inputs_embeds_and_logits_to_keep_are_phis():
    phi, nanophi = make_pair()
    ids = tokens()
    embeds = phi.get_input_embeddings()(ids)
    assert difference(nanophi(inputs_embeds=embeds).logits, phi(ids).logits) < TOLERANCE
    mask = torch.zeros(2, 21, dtype=torch.bool)
    mask[0, 3] = mask[1, 5:9] = True
    for keep in (3, torch.tensor([2, 7, 20]), torch.tensor([[2, 7], [0, 20]]), mask):
        kept, expected = (model(ids, logits_to_keep=keep).logits for model in (nanophi, phi))
        assert kept.shape == expected.shape and difference(kept, expected) < TOLERANCE
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        nanophi(ids, inputs_embeds=embeds)
    assert difference(nanophi(ids, return_dict=False)[0], phi(ids).logits) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_stays_as_near_to_float32_as_phi_does(tmp_path, dtype):
    phi, nanophi = make_pair()
    ids = tokens()
    exact = phi(ids).logits
    nanophi.save_pretrained(tmp_path)
    errors = []
    for reader in (PhiForCausalLM, NanoPhiForCausalLM):
        model = reader.from_pretrained(tmp_path, dtype=dtype)
        assert model.dtype == dtype
        errors.append((model(ids).logits.float() - exact).square().mean().sqrt().item())
    assert errors[1] < 1.2 * errors[0] + 1e-6


@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_documents_packed_in_one_row_are_kept_apart(attention, key_value_heads):
    """Positions that start again mark documents, each of which gets the logits that it has alone."""
    phi, nanophi = make_pair(key_value_heads=key_value_heads)
    lengths = (7, 1, 13)
    ids = tokens(batch=2, length=sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    alone = torch.cat([phi(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    nanophi.set_attn_implementation(attention)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # flex attention without its compiler
        assert difference(nanophi(ids, position_ids=positions).logits, alone) < TOLERANCE
        assert difference(nanophi(ids, position_ids=positions.expand(2, -1)).logits, alone) < TOLERANCE
        # Without the restarts they do attend to each other.
        assert difference(nanophi(ids).logits, alone) > 100 * TOLERANCE
        assert difference(nanophi(ids).logits, phi(ids).logits) < TOLERANCE


def test_training_on_a_packed_row_is_training_on_its_documents():
    phi, nanophi = make_pair()
    lengths = (7, 14)
    ids = tokens(batch=1, length=sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = ids.clone()
    labels[positions == 0] = -100  # the token before a document's first one belongs to another document
    outputs = nanophi.train()(ids, position_ids=positions, labels=labels)
    outputs.loss.backward()
    parts = ids.split(lengths, dim=1)
    loss = sum(phi(part, labels=part).loss * (part.shape[1] - 1) for part in parts) / sum(n - 1 for n in lengths)
    loss.backward()
    assert difference(outputs.loss, loss) < TOLERANCE
    assert_same_gradients(gradients(phi), gradients(nanophi))
