"""A chat model learns what a plain TRL script would, and a killed run is the run that was not killed."""

import itertools

import datasets
import pyarrow.parquet as pq
import pytest
import torch
import trl
from chat_run import END, TRAINING, make_base, pipeline, talk
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.data.conversations import TEMPLATE
from nanophi.training import chat
from nanophi.training.optimizer import ADAM_EPS
from nanophi.training.run_trainer import RunTrainer

ROWS = [{"messages": talk(number)} for number in range(24)]
PAIRS = [
    {"prompt": talk(n)[:1], "chosen": talk(n)[1:2], "rejected": [{"role": "assistant", "content": "I do not know."}]}
    for n in range(12)
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    make_base(runs / "base")
    return runs


@pytest.fixture(scope="module")
def sft(runs):
    run = pipeline(runs, ROWS)
    run.make("training")
    run.write_recipe()
    return run.path


def plain(runs, kind, config, rows, tmp_path, **more):
    """Losses of a script that uses TRL alone, on stock Phi."""
    checkpoint = runs / "base/checkpoints/step-000001"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = TEMPLATE
    more |= {"max_steps": TRAINING["steps"], "per_device_train_batch_size": TRAINING["batch_size"]}
    more |= {"learning_rate": TRAINING["learning_rate"], "lr_scheduler_type": "constant", "weight_decay": 0.1}
    more |= {"adam_beta2": 0.95, "adam_epsilon": ADAM_EPS, "max_length": 128, "bf16": False, "use_cpu": True, "seed": 0}
    arguments = config(output_dir=str(tmp_path), logging_steps=1, save_strategy="no", report_to=[], **more)
    model, reference = (AutoModelForCausalLM.from_pretrained(checkpoint) for _ in range(2))
    extra = {"ref_model": reference} if kind is trl.DPOTrainer else {}
    data = datasets.Dataset.from_list(rows)
    trainer = kind(model, args=arguments, train_dataset=data, processing_class=tokenizer, **extra)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def losses(run):
    return [entry["loss"] for entry in read_json(run / "training.json")["log"]]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_losses_are_those_of_plain_trl(runs, sft, tmp_path, monkeypatch, method):
    monkeypatch.setenv("CI", "1")
    if method == "sft":
        options = {"packing": True, "assistant_only_loss": True}
        run, expected = sft, plain(runs, trl.SFTTrainer, trl.SFTConfig, ROWS, tmp_path, **options)
    else:
        pipe = pipeline(runs, PAIRS, "dpo", method="dpo", beta=0.5)
        pipe.make("training")
        run, expected = pipe.path, plain(runs, trl.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, beta=0.5)
    assert losses(run) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
def test_a_killed_run_ends_as_one_that_was_not_killed(runs, sft, lora, monkeypatch):
    name = "lora" if lora else "again"
    if lora:
        whole = pipeline(runs, ROWS, "whole", lora=lora)
        whole.make("training")
        sft = whole.path
    steps, step = iter(range(5)), trl.SFTTrainer.training_step

    def dying_step(self, *args, **kwargs):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trl.SFTTrainer, "training_step", dying_step)
        pipeline(runs, ROWS, name, lora=lora).make("training")
    assert [path.name for path in (runs / name / "checkpoints").iterdir()] == ["step-000003"]
    resumed = pipeline(runs, ROWS, name, lora=lora)
    resumed.make("training")
    weights = [load_file(run / "checkpoints/step-000006/model.safetensors") for run in (sft, resumed.path)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert losses(sft) == losses(resumed.path)
    summaries = [read_json(path / "training.json")["summary"] for path in (sft, resumed.path)]
    assert summaries[0]["tokens_seen"] == summaries[1]["tokens_seen"]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_tokens_and_epochs_are_those_that_were_read(runs, method, monkeypatch):
    """30 conversations fit into fewer rows than two batches: every epoch ends with a short one."""
    rows = [{"messages": talk(number)} for number in range(30)] if method == "sft" else PAIRS[:11]
    read, step = [], trl.SFTTrainer.training_step if method == "sft" else trl.DPOTrainer.training_step

    def counted_step(self, model, inputs, *args, **kwargs):
        read.append(int(inputs["attention_mask"].sum()) if method == "dpo" else inputs["input_ids"].numel())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer if method == "sft" else trl.DPOTrainer, "training_step", counted_step)
    lengths = []
    fit = RunTrainer.fit
    monkeypatch.setattr(
        RunTrainer, "fit", lambda self, *a, **k: lengths.append(len(self.train_dataset)) or fit(self, *a, **k)
    )
    stated = {"steps": 5, "save_steps": 3, "batch_size": 8}
    run = pipeline(runs, rows, f"{method}-tokens", method=method, training=stated)
    summary = run.make("training")
    assert lengths[0] % 8 and len(read) == 5
    assert summary["epochs"] == 5 / -(-lengths[0] // 8)
    assert summary["tokens_seen"] == sum(read)
    log = read_json(run.path / "training.json")["log"]
    assert [entry["tokens_seen"] for entry in log] == list(itertools.accumulate(read))
    assert read_json(run.path / "checkpoints/step-000005/checkpoint.json")["tokens_seen"] == sum(read)


def test_a_checkpoint_is_a_whole_model_with_the_template(runs, sft):
    checkpoint = sft / "checkpoints/step-000006"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = tokenizer.apply_chat_template(talk(1)[:3], tokenize=False, add_generation_prompt=True)
    assert text == f"User:\nSay 1.{END}Assistant:\nIt is 7.{END}User:\nAgain?{END}Assistant:\n"
    before, after = (read_json(path / "config.json") for path in (runs / "base/checkpoints/step-000001", checkpoint))
    assert {key for key in before if before[key] != after.get(key)} <= {"use_cache"}
    assert after.get("pad_token_id") is None
    assert not list(checkpoint.glob("adapter*")) and not list(checkpoint.glob("*.bin"))


def test_a_chat_model_is_a_base_and_the_record_names_what_it_learned_from(runs, sft):
    second = pipeline(runs, PAIRS, "second", method="dpo", base=str(sft)).tokens()
    (first,) = second["bases"]
    assert (second["base"], second["origin"], second["own_template"]) == ("chat", None, False)
    assert (first["name"], first["method"], first["base"], first["train"]) == ("chat", "sft", "base", 24)
    assert str(runs / "chat.jsonl") in first["sources"] and first["hub"] == [None]


def test_other_conversations_or_another_tokenizer_than_recorded_are_refused(runs):
    run = pipeline(runs, PAIRS, "other", method="dpo")
    run.tokens()
    config = NanoPhiConfig.from_pretrained(run.path / "data/base")
    for split in ("train", "heldout"):
        file = run.path / f"data/conversations/{split}.parquet"
        whole = file.read_bytes()
        pq.write_table(pq.read_table(file).slice(1), file)
        with pytest.raises(UserError, match=rf"{split}.parquet holds other conversations than .*; delete it and run"):
            chat.train(run.path, run.recipe, config)
        file.write_bytes(whole[:-9])
        with pytest.raises(UserError, match=rf"{split}.parquet cannot be read; delete it and run"):
            chat.train(run.path, run.recipe, config)
        file.write_bytes(whole)
    template = run.path / "data/tokenizer/tokenizer_config.json"
    template.write_text(template.read_text().replace("Assistant:", "Model:"))
    with pytest.raises(UserError, match="data/tokenizer is not the tokenizer that"):
        chat.train(run.path, run.recipe, config)


def test_adapters_are_merged_into_every_checkpoint(runs):
    run = pipeline(runs, ROWS, "merged", lora={"rank": 4}, training={"steps": 3})
    run.make("training")
    merged = AutoModelForCausalLM.from_pretrained(run.path / "checkpoints/step-000003")
    base = AutoModelForCausalLM.from_pretrained(runs / "base/checkpoints/step-000001")
    ids = torch.arange(1, 60)[None]
    untrained = base(ids).logits
    adapted = PeftModel.from_pretrained(base, run.path / "training_state/step-000003")
    assert (merged(ids).logits - adapted(ids).logits).abs().max() <= 1e-4
    assert (merged(ids).logits - untrained).abs().max() > 1e-3


def test_trl_is_asked_for_before_work(runs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with pytest.raises(UserError, match=r"need TRL: pip install 'nanophi\[chat\]'"):
        pipeline(runs, ROWS, "none").check("verification")
