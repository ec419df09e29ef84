"""Estimates against torch's own counts, measured memory, and the published run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command import nanophi
from torch.utils.flop_counter import FlopCounterMode

from nanophi import NanoPhiConfig, NanoPhiForCausalLM
from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.core.recipe import Recipe, Training, load_recipe
from nanophi.training import arguments, budget, estimate
from nanophi.training.loss import use_chunked_loss

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL: dict[str, Any] = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("nano-phi-115m")


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"qk_layernorm": True}])
def test_parameters_are_those_of_the_model(fields: dict[str, Any]) -> None:
    config = NanoPhiConfig(**{**SMALL, **fields})
    assert budget.parameter_count(config) == sum(p.numel() for p in NanoPhiForCausalLM(config).parameters())


def test_flops_are_those_that_torch_counts() -> None:
    config = NanoPhiConfig(**SMALL, attn_implementation="eager")
    model = NanoPhiForCausalLM(config).eval()  # in evaluation the head is one plain product
    ids = torch.zeros(2, 128, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    # Biases and norms are parameters, but not products.
    assert counter.get_total_flops() / ids.numel() == pytest.approx(budget.flops_per_token(config, 128), rel=0.02)


def measured_peaks() -> list[tuple[str, int, float]]:
    """Precision, rows of 1,024 tokens and bytes of the kept measurements, all of the 115M shape on processors."""
    peaks = []
    for entry in read_json(BENCHMARKS / "train_memory.json"):
        for precision in ("fp32", "bf16"):
            runs = entry[precision]
            for run in [runs] if "training_bytes" in runs else runs.values():
                peaks.append((precision, int(entry["shape"].split()[0]), run["with_evaluation_bytes"]))
    for entry in read_json(BENCHMARKS / "train_speed.json").values():
        measured = entry["contestants"]["nanophi"]["peak_bytes"]
        peaks.append((entry["precision"], int(entry["step"].split()[2]), measured))
    return peaks


def test_memory_is_what_the_kept_measurements_took(recipe: Recipe) -> None:
    assert len(measured_peaks()) >= 8
    for precision, rows, measured in measured_peaks():
        section = recipe.training.model_copy(update={"precision": precision})
        estimated = budget.peak_bytes(recipe.model_config_for(), section, rows)
        assert estimated == pytest.approx(measured, rel=0.15), (precision, rows)


def peak_of(function) -> int:
    """Bytes that a function's tensors take at most, from torch's own record of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_takes_what_torch_records(checkpointing: bool) -> None:
    """The activations alone: what a step takes beyond weights, gradients, moments and logits."""
    config = NanoPhiConfig(**{**SMALL, "num_hidden_layers": 6, "vocab_size": 64, "eos_token_id": 0, "bos_token_id": 0})
    common = {"steps": 10, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32"}
    section = Training(**common, arguments={"gradient_checkpointing": checkpointing})
    model, rows = NanoPhiForCausalLM(config).train(), 24
    use_chunked_loss(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.zeros(rows, 128, dtype=torch.int64)
    model(input_ids=ids, labels=ids).loss.backward()  # makes the gradients, which are held from then on
    measured = peak_of(lambda: model(input_ids=ids, labels=ids).loss.backward())
    held = 16 * budget.parameter_count(config)
    assert budget.peak_bytes(config, section, rows) - held == pytest.approx(measured, rel=0.25)


def test_the_published_run(recipe: Recipe) -> None:
    published = estimate.published_run()
    assert published["tokens_per_second"] == pytest.approx(39_000, rel=0.01)
    assert published["mfu"] == pytest.approx(0.06, abs=0.006)
    assert budget.flops_per_token(recipe.model_config_for(), 1024) == pytest.approx(515e6, rel=0.001)
    # The same speed on the same device must take the same time.
    result = estimate.predict(recipe, budget.DEVICES["a100-40g"], mfu=published["mfu"])
    assert (result["hours"], result["dollars"]) == pytest.approx((52, published["dollars"]))


def test_more_memory_fits_more_rows_and_too_little_none(recipe: Recipe) -> None:
    fits = {name: estimate.predict(recipe, device)["micro_batch_size"] for name, device in budget.DEVICES.items()}
    assert fits["t4"] < fits["a100-40g"] < fits["h200"]
    result = estimate.predict(recipe, budget.Device("none", 1e12, 1e11, 1e11, 1e9, 100, 1.0, "nobody"))
    assert result["micro_batch_size"] == 0 and "does not fit" in estimate.render(recipe, "none", result)


def test_time_cost_and_memory_are_those_of_the_precision(recipe: Recipe) -> None:
    """The A100's data sheet: 312 TFLOP/s in bf16, 156 in TF32, 19.5 in float32; a T4 has no bf16, and no TF32."""

    def of(device: str, **fields: Any) -> dict[str, Any]:
        changed = recipe.training.model_copy(update=fields)
        return estimate.predict(recipe.model_copy(update={"training": changed}), budget.DEVICES[device])

    bf16, fp32 = of("a100-40g", precision="bf16"), of("a100-40g", precision="fp32")
    assert of("a100-40g", precision="auto") == bf16
    for key in ("hours", "dollars", "kwh"):
        assert fp32[key] == pytest.approx(16 * bf16[key])
    assert fp32["peak_bytes"][1] > bf16["peak_bytes"][1]
    tf32 = of("a100-40g", precision="fp32", arguments={"tf32": True})
    assert tf32["hours"] == pytest.approx(2 * bf16["hours"])
    assert of("a100-40g", precision="fp32", compile=True)["hours"] == tf32["hours"]
    assert of("a100-40g", precision="fp32", compile=True, arguments={"tf32": False})["hours"] == fp32["hours"]
    assert tf32["mfu"] == fp32["mfu"] == estimate.ASSUMED_MFU
    assert of("t4", precision="auto") == of("t4", precision="fp32")
    for device in budget.DEVICES.values():
        assert device.fp32_flops <= device.tf32_flops <= device.bf16_flops


def test_a_micro_batch_that_is_recommended_can_be_trained_with(recipe: Recipe) -> None:
    for batch, devices in ((480, 1), (480, 8), (7, 1), (12, 4)):
        section = recipe.training.model_copy(update={"batch_size": batch})
        changed = recipe.model_copy(update={"training": section})
        rows = estimate.predict(changed, budget.DEVICES["a100-40g"], devices)["micro_batch_size"]
        chosen = section.model_copy(update={"micro_batch_size": rows})
        assert rows > 1 and arguments.micro_batch_size(chosen, devices) == rows
    with pytest.raises(UserError, match=r"use a training.batch_size that 5 divides$"):
        estimate.predict(changed, budget.DEVICES["a100-40g"], devices=5)


@pytest.mark.parametrize("options", [[], ["--measure"]])
def test_a_chat_recipe_is_refused_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # the base is not here
    monkeypatch.setattr("nanophi.training.trainer.train", None)
    refused = r"nanophi: demo-chat trains on conversations, .*; this is for pretraining"
    assert re.match(refused, nanophi("estimate", "demo-chat", *options))


def test_devices_are_found_by_either_name() -> None:
    found = {name: budget.device_named(f"NVIDIA {name}") for name in ("H200", "L40S", "A100-SXM4-80GB", "L40", "GPU")}
    assert list(found.values()) == [*(budget.DEVICES[name] for name in ("h200", "l40s", "a100-80g")), None, None]
    assert budget.find_device("A100") == budget.find_device("a100-40g") == "a100-40g"  # the published run's
    for name, hint in (("h10", r"did you mean 'h100' or 'h200'\?"), ("zzz", "known: a100-40g, .*, t4")):
        with pytest.raises(UserError, match=rf"unknown device '{name}'; {hint}$"):
            budget.find_device(name)


def test_the_verb_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert not nanophi("estimate", "demo", "--device", "h100", "--json")
    found = json.loads(capsys.readouterr().out)
    expected = estimate.predict(load_recipe("demo"), budget.DEVICES["h100"])
    assert (found["recipe"], found["device"], found["devices"]) == ("demo", "h100", 1)
    assert {key: found[key] for key in expected} == json.loads(json.dumps(expected))


def test_the_verb_measures_real_steps(capsys: pytest.CaptureFixture[str]) -> None:
    small = [f"--set=model.{key}={value}" for key, value in SMALL.items()]
    assert not nanophi("estimate", "demo", *small, "--set=training.batch_size=2", "--measure", "--price", "2")
    output = capsys.readouterr().out
    assert "beside the published run" in output and "2 d 4 h" in output
    assert "speed: measured; price: $2.00 an hour, as given" in output
