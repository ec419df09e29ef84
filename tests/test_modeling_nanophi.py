"""NanoPhi in training mode, its RoPE after loading, its two loaders, and the tools that hook into it."""

import copy
import json
import os
import sys

import fresh
import pytest
import torch
from tiny_model import TOLERANCE, assert_same_gradients, difference, gradients, make_model, tokens
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nanophi import NanoPhiForCausalLM, NanoPhiModel

# Training mode


def test_training_mode_gives_logits_and_uses_the_loss_function_and_the_head():
    model, ids = make_model(), tokens()
    outputs = model.train()(ids, labels=ids)
    assert outputs.logits.shape == (2, 21, 131)
    assert difference(outputs.loss, ForCausalLMLoss(outputs.logits, ids, 131)) < TOLERANCE
    seen = []
    model.lm_head.register_full_backward_hook(lambda *arguments: seen.append("backward"))
    plain = model.lm_head.forward
    model.lm_head.forward = lambda states: (seen.append("forward"), plain(states))[1]
    model(ids, labels=ids).loss.backward()
    assert seen == ["forward", "backward"]
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + vocab_size
    assert model(ids, labels=ids).loss.item() == 131
    assert {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)} == {torch.nn.Linear}


@pytest.mark.parametrize("how", ["checkpointed", "checkpointed reentrantly", "compiled in one graph"])
def test_gradients_are_the_same_however_they_are_computed(how):
    model, ids = make_model().train(), tokens()
    model(ids, labels=ids).loss.backward()
    plain = gradients(model)
    if how == "compiled in one graph":
        torch.compile(model, backend="aot_eager", fullgraph=True)(ids, labels=ids).loss.backward()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": how == "checkpointed reentrantly"})
        model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
    assert_same_gradients(plain, gradients(model))


def test_dropout_is_applied_in_training_only():
    model = make_model(resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5)
    ids = tokens()
    assert difference(model.eval()(ids).logits, model(ids).logits) == 0
    model.train()
    assert difference(model(ids).logits, model(ids).logits) > 0.01


# Loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_frequencies_are_the_formula_after_loading(tmp_path, dtype):
    """from_pretrained builds on the meta device: a buffer that is not filled in again is garbage, silently."""
    make_model(rope_theta=5000.0, partial_rotary_factor=0.5).save_pretrained(tmp_path)
    expected = torch.tensor([5000.0 ** (-2 * i / 8) for i in range(4)])
    rope = NanoPhiForCausalLM.from_pretrained(tmp_path, dtype=dtype).model.rotary_emb
    torch.testing.assert_close(rope.inv_freq, expected, rtol=1e-6, atol=0)
    cos, sin = rope(torch.empty(0), torch.tensor([[0, 3]]))
    assert cos.shape == (1, 2, 8)
    torch.testing.assert_close(cos[0, 1], torch.cat((expected, expected)).mul(3).cos())
    torch.testing.assert_close(sin[0, 1], torch.cat((-expected, expected)).mul(3).sin())


LOADERS = """
import sys, torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, copy = sys.argv[1:]
ids = torch.arange(3, 24)[None]
outputs = {}
for trust in (False, True):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    outputs[type(model).__name__] = model(ids).logits
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 24)
assert list(outputs) == ["PhiForCausalLM", "NanoPhiForCausalLM"], list(outputs)
assert (outputs["PhiForCausalLM"] - outputs["NanoPhiForCausalLM"]).abs().max() < 1e-5
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "nanophi"
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "NanoPhiModel"
transformers.set_seed(0)
for task in ("SequenceClassification", "TokenClassification"):
    auto = getattr(transformers, f"AutoModelFor{task}")
    classifier = auto.from_pretrained(folder, trust_remote_code=True, num_labels=3).eval()
    assert type(classifier).__name__ == f"NanoPhiFor{task}"
    classifier.save_pretrained(f"{copy}-{task}")
    logits = classifier(ids).logits
    assert logits.shape == ((1, 3) if task == "SequenceClassification" else (1, 21, 3))
    for trust, name in ((True, "NanoPhi"), (False, "Phi")):
        again = auto.from_pretrained(f"{copy}-{task}", trust_remote_code=trust).eval()
        assert type(again).__name__ == f"{name}For{task}"
        assert (again(ids).logits - logits).abs().max() < 1e-5
model.save_pretrained(copy)
assert "nanophi" not in sys.modules
"""


def test_both_loaders_work_in_a_fresh_process_without_a_warning(tmp_path):
    """Elsewhere, without the package, a saved folder is Phi without trust and NanoPhi with it; saved again, still."""
    model = make_model()
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path / "first")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    for folder, again in (("first", "second"), ("second", "third")):
        command = [sys.executable, "-I", "-c", LOADERS, str(tmp_path / folder), str(tmp_path / again)]
        process = fresh.Popen(command, tmp_path, environment)
        printed = process.communicate()[0]
        assert process.returncode == 0, printed
        for word in ("type `", "deprecated", "not support", "mismatch"):
            assert word not in printed, printed
        files = {file.name for file in (tmp_path / again).iterdir()}
        assert {"configuration_nanophi.py", "modeling_nanophi.py", "model.safetensors", "config.json"} <= files


def test_a_trainer_checkpoint_is_a_complete_folder(tmp_path):
    """Trainer switches the cache off in the configuration that it saves; the file must not say so."""
    model = make_model()
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=4)]
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=2, save_steps=2, **quiet)
    assert Trainer(model=model, args=arguments, train_dataset=rows).train().training_loss > 0
    folder = tmp_path / "checkpoint-2"
    assert (folder / "modeling_nanophi.py").is_file() and (folder / "configuration_nanophi.py").is_file()
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["use_cache"]) == ("phi", True)
    ids = tokens()
    assert difference(NanoPhiForCausalLM.from_pretrained(folder)(ids).logits, model.eval()(ids).logits) < TOLERANCE


# Other tools


def test_the_transformers_backend_of_vllm_and_sglang_gets_what_it_asks_for():
    """Their contract: the base model alone, attention by a registered function that is handed their keyword
    arguments in every layer, and finds its layer by `module.layer_idx`; rows without a batch dimension of their own.
    """
    model = make_model().eval()
    base = NanoPhiModel(copy.deepcopy(model.config)).eval()
    base.load_state_dict(model.model.state_dict())
    assert NanoPhiModel._supports_attention_backend and NanoPhiModel.base_model_prefix == "model"
    assert sum(isinstance(module, torch.nn.ModuleList) for module in base.modules()) == 1
    assert set(base.config.base_model_tp_plan.values()) <= {"colwise", "rowwise"}
    seen = []

    def served_attention(module, query, key, value, attention_mask, scaling, attention_instances, **kwargs):
        seen.append(module.layer_idx)
        assert attention_mask is None
        assert attention_instances[module.layer_idx] == f"kernel {module.layer_idx}"
        assert module.is_causal
        settings = {"is_causal": True, "scale": scaling, "enable_gqa": True}
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **settings).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("served", served_attention)
    base.config._attn_implementation = "served"
    ids = tokens(batch=1)
    kernels = {0: "kernel 0", 1: "kernel 1"}
    asked = {"position_ids": torch.arange(21)[None], "use_cache": False, "return_dict": False}
    hidden = base(ids, attention_instances=kernels, **asked)[0][0]
    assert seen == [0, 1] and hidden.shape == (21, 64)
    assert difference(model.lm_head(hidden), model(ids).logits[0]) < TOLERANCE
