"""What a run will take, before any money is spent: FLOP, time, memory, money, energy, emissions."""

from __future__ import annotations

import dataclasses
import difflib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.files import UserError
from nanophi.recipe import Recipe, Training

ASSUMED_MFU = 0.40
"""Share of the peak that a run is taken to reach until it is measured: PaLM reached 0.46 at 540B parameters (Chowdhery
et al. 2022, table 3); small models with a large vocabulary reach less."""
GRID_GRAMS_PER_KWH = 480.0
"""Emissions of the world's average electricity in 2023 (Ember, Global Electricity Review 2024)."""
USABLE_MEMORY = 0.92
"""Share of a device's memory that tensors get; the rest is the driver's context and the allocator's gaps."""
MEASURED_STEPS = 6


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        cuda_name: part of the name that CUDA gives it.
        bf16_flops: peak dense bf16 rate with float32 accumulation, FLOP/s; of a device without bf16 its float32 rate,
            since it trains in that.
        memory: bytes.
        watts: board power.
        dollars_per_hour: on-demand list price of one in a cloud.
        price_source: whose price, and when it was read.
    """

    cuda_name: str
    bf16_flops: float
    memory: float
    watts: float
    dollars_per_hour: float
    price_source: str


# Rates, memory and power: the makers' data sheets, of the SXM boards where there are several.
DEVICES = {
    "a100-40g": Device("A100-SXM4-40GB", 312e12, 40e9, 400, 1.99, "lambda.ai/pricing, 2026-11-16"),
    "a100-80g": Device("A100", 312e12, 80e9, 400, 1.79, "runpod.io/pricing, secure cloud, 2026-11-09"),
    "h100": Device("H100", 989e12, 80e9, 700, 3.99, "runpod.io/pricing, secure cloud, 2026-11-09"),
    "h200": Device("H200", 989e12, 141e9, 700, 4.59, "runpod.io/pricing, 2026-10-07"),
    "l40s": Device("L40S", 362e12, 48e9, 350, 1.95, "modal.com/pricing, 2026-05-07"),
    "l4": Device("L4", 121e12, 24e9, 72, 0.80, "modal.com/pricing, 2026-05-07"),
    "rtx-4090": Device("RTX 4090", 165e12, 24e9, 450, 0.29, "openrelay.inc, 2026-09-20"),
    "rtx-3090": Device("RTX 3090", 71e12, 24e9, 350, 0.18, "openrelay.inc, 2026-09-20"),
    "a10g": Device("A10G", 70e12, 24e9, 300, 1.01, "AWS g5.xlarge, us-east-1, 2026-06-17"),
    "t4": Device("T4", 8.1e12, 16e9, 70, 0.59, "modal.com/pricing, 2026-05-07"),
}

PUBLISHED_DEVICE, PUBLISHED_TOKENS, PUBLISHED_HOURS = "a100-40g", 14_000 * 512 * 1024, 52.0
"""The run of https://huggingface.co/kenhktsui/nano-phi-115M-v0.1, as its card gives it."""


def parameter_count(config: NanoPhiConfig) -> int:
    """Number of parameters of `NanoPhiForCausalLM(config)`."""
    hidden, mlp, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    head = hidden // config.num_attention_heads
    key_value = config.num_key_value_heads * head
    attention = 2 * (hidden * hidden + hidden) + 2 * (hidden * key_value + key_value)
    layer = attention + (hidden * mlp + mlp) + (mlp * hidden + hidden) + 2 * hidden
    if config.qk_layernorm:
        layer += 4 * head
    embeddings = vocab * hidden * (1 if config.tie_word_embeddings else 2) + vocab
    return config.num_hidden_layers * layer + 2 * hidden + embeddings


def flops_per_token(config: NanoPhiConfig, context_length: int) -> float:
    """Training FLOP per token, forward and backward: 6 per parameter that multiplies, and attention's 12 L H T.

    The formula of PaLM (https://arxiv.org/abs/2204.02311, appendix B). The embedding table is a lookup and does not
    count; the output head does. Attention counts the full square, not the causal half.
    """
    lookup = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * config.hidden_size * context_length
    return 6 * (parameter_count(config) - lookup) + attention


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a device by the name that CUDA gives it; None if it is not in the table."""
    return next((device.bf16_flops for device in DEVICES.values() if device.cuda_name in device_name), None)


def find_device(name: str) -> Device:
    """A device of the table. Raises `UserError` with the nearest names."""
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    near = difflib.get_close_matches(name.lower(), DEVICES, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(DEVICES)}"
    raise UserError(f"unknown device '{name}'; {hint}")


def state_bytes(config: NanoPhiConfig, training: Training) -> int:
    """Bytes that are held all the time: float32 weights and optimizer state, and gradients where they accumulate.

    AdamW keeps two float32 moments per parameter, Muon one per parameter of the matrices between the layers.
    """
    parameters = parameter_count(config)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    key_value = config.num_key_value_heads * (hidden // config.num_attention_heads)
    matrices = layers * (2 * hidden * hidden + 2 * hidden * key_value + 2 * hidden * config.intermediate_size)
    moments = 8 * parameters - (4 * matrices if training.optimizer == "muon" else 0)
    accumulates = training.micro_batch_size is not None and training.micro_batch_size < training.batch_size
    return 4 * parameters + moments + (4 * parameters if accumulates else 0)


def row_bytes(config: NanoPhiConfig, training: Training) -> int:
    """Bytes that the backward pass keeps per row, counted in forward passes of a small model of the same layers.

    Counts each storage that autograd saves once. They are a constant, plus for each row a constant and as much again
    for each layer, so four small counts stand for any depth. Fused attention saves the same tensors on a GPU.
    """
    import torch

    from nanophi.modeling_nanophi import NanoPhiForCausalLM
    from nanophi.training.loss import use_chunked_loss

    fields = {key: value for key, value in config.to_dict().items() if key in NanoPhiConfig.__dataclass_fields__}
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=training.precision != "fp32")

    def count(layers: int, rows: int) -> int:
        # What the head saves does not grow with the rows, so the vocabulary may be small.
        small = {**fields, "num_hidden_layers": layers, "vocab_size": 64, "eos_token_id": 0, "bos_token_id": 0}
        with torch.random.fork_rng(devices=[]):
            model = NanoPhiForCausalLM(NanoPhiConfig(**small)).train()
        use_chunked_loss(model)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            # Returned and thus kept, so that no address is taken twice.
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids = torch.zeros(rows, config.max_position_embeddings, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
            loss = model(input_ids=ids, labels=ids).loss
        del loss
        return sum(sizes.values())

    one, two = (count(layers, 2) - count(layers, 1) for layers in (1, 2))
    return one + (two - one) * (config.num_hidden_layers - 1)


def peak_bytes(config: NanoPhiConfig, training: Training, rows: int, row: int) -> int:
    """Bytes at the height of a training step with a micro-batch of `rows`, each of `row_bytes`.

    That is the end of the forward pass, when the loss holds the head's gradient and `LOSS_CHUNK` rows of logits
    twice, or the end of the backward pass, when it has come down to all gradients. On the safe side: measured peaks
    are lower, since autocast casts some weights anew instead of keeping the copy.
    """
    from nanophi.training.loss import LOSS_CHUNK

    parameters = parameter_count(config)
    copies = 0 if training.precision == "fp32" else 2 * parameters
    tokens = min(LOSS_CHUNK, rows * config.max_position_embeddings)
    head = 4 * config.vocab_size * (config.hidden_size + 2 * tokens)
    return state_bytes(config, training) + max(copies + head + rows * row, 4 * parameters)


def estimate(
    recipe: Recipe,
    device: Device,
    *,
    devices: int = 1,
    mfu: float = ASSUMED_MFU,
    tokens_per_second: float | None = None,
    dollars_per_hour: float | None = None,
    grams_per_kwh: float = GRID_GRAMS_PER_KWH,
) -> dict[str, Any]:
    """What the recipe's training takes on so many of a device.

    Args:
        tokens_per_second: measured, of all devices; None: from `mfu` and the device's peak.
        dollars_per_hour: of one device, in place of the table's.
        grams_per_kwh: emissions of the electricity.

    Returns:
        `tokens`, `tokens_per_second`, `mfu`, `hours`, `dollars`, `kwh` and `co2_grams` (board power all the time,
        without host and cooling), `peak_bytes` (of one row, and of `micro_batch_size`), `micro_batch_size`: the
        largest power of two of rows that fits, 0 if none does; `sources`: of speed and price.
    """
    config, training = recipe.model_config_for(), recipe.training
    flops = flops_per_token(config, config.max_position_embeddings)
    tokens = training.steps * training.batch_size * config.max_position_embeddings
    peak = device.bf16_flops * devices
    speed = mfu * peak / flops if tokens_per_second is None else tokens_per_second
    hours = tokens / speed / 3600
    kwh = hours * devices * device.watts / 1000
    row = row_bytes(config, training)
    sizes = [1 << power for power in range(training.batch_size.bit_length())]
    peaks = {rows: peak_bytes(config, training, rows, row) for rows in sizes}
    fits = [rows for rows in sizes if peaks[rows] <= USABLE_MEMORY * device.memory]
    largest = max(fits, default=0)
    price = device.dollars_per_hour if dollars_per_hour is None else dollars_per_hour
    return {
        "tokens": tokens,
        "tokens_per_second": speed,
        "mfu": speed * flops / peak,
        "hours": hours,
        "dollars": hours * devices * price,
        "kwh": kwh,
        "co2_grams": kwh * grams_per_kwh,
        "peak_bytes": {rows: peaks[rows] for rows in sorted({1, largest or 1})},
        "micro_batch_size": largest,
        "sources": (
            f"speed: {'assumed' if tokens_per_second is None else 'measured'}; price: ${price:.2f} an hour, "
            f"{device.price_source if dollars_per_hour is None else 'as given'}"
        ),
    }


def published_run(recipe: Recipe) -> dict[str, Any]:
    """The published model's own run, in the terms of `estimate`; its FLOP per token are those of the recipe's model."""
    device, tokens, hours = DEVICES[PUBLISHED_DEVICE], PUBLISHED_TOKENS, PUBLISHED_HOURS
    config = recipe.model_config_for()
    speed = tokens / hours / 3600
    kwh = hours * device.watts / 1000
    return {
        "tokens": tokens,
        "tokens_per_second": speed,
        "mfu": speed * flops_per_token(config, config.max_position_embeddings) / device.bf16_flops,
        "hours": hours,
        "dollars": hours * device.dollars_per_hour,
        "kwh": kwh,
        "co2_grams": kwh * GRID_GRAMS_PER_KWH,
    }


def measure(recipe: Recipe, report: Callable[[str], None] = print) -> float:
    """Tokens per second of a few steps of `nanophi train` on this machine: one micro-batch each of random tokens."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    from nanophi.files import write_json
    from nanophi.training.trainer import train

    config = recipe.model_config_for(eos_token_id=0, bos_token_id=0)
    rows = recipe.training.micro_batch_size or min(recipe.training.batch_size, 4)
    update = {
        "steps": MEASURED_STEPS,
        "batch_size": rows,
        "micro_batch_size": rows,
        "warmup_steps": 0,
        "keep_steps": [],
        "save_steps": MEASURED_STEPS,
        "eval_steps": MEASURED_STEPS + 1,
        "logging_steps": 1,
        "report_to": [],
        "track_energy": False,
        "spike_threshold": None,
    }
    with tempfile.TemporaryDirectory(prefix="nanophi-estimate-") as folder:
        run = Path(folder)
        length = config.max_position_embeddings
        tokens = np.random.default_rng(0).integers(1, config.vocab_size, (rows * MEASURED_STEPS, length), np.int32)
        table = pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel()), length)})
        for split in ("train", "heldout"):
            Dataset(table).save_to_disk(str(run / "data/tokens" / split))
        counts = {"bytes_per_token": 4.0, "sha256": "random"}
        write_json(run / "data/tokens/tokens.json", {"train": counts, "heldout": counts})
        (run / "data/tokenizer").mkdir()
        write_json(run / "data/tokenizer/tokenizer.json", {})
        summary = train(run, recipe.training.model_copy(update=update), config, recipe.seed, "measuring", report)
    return float(summary["tokens_per_second"])


def render(recipe: Recipe, name: str, result: dict[str, Any], published: dict[str, Any]) -> str:
    """`estimate`'s result beside the published run, as plain text."""
    lines = [f"{recipe.name} on {name}, beside the published run (A100-40GB)", ""]
    rows = [
        ("tokens", "{:,.2f} B", "tokens", 1e-9),
        ("tokens/s", "{:,.0f}", "tokens_per_second", 1),
        ("MFU", "{:.1f} %", "mfu", 100),
        ("hours", "{:,.1f}", "hours", 1),
        ("dollars", "{:,.0f}", "dollars", 1),
        ("kWh", "{:,.1f}", "kwh", 1),
        ("kg CO2e", "{:,.1f}", "co2_grams", 1e-3),
    ]
    for title, form, key, scale in rows:
        ours, theirs = (form.format(values[key] * scale) for values in (result, published))
        lines.append(f"{title:<10}{ours:>14}{theirs:>14}")
    peaks = ", ".join(
        f"{size / 1e9:.1f} GB with a micro-batch of {rows}" for rows, size in result["peak_bytes"].items()
    )
    lines += ["", f"memory: {peaks}" + (" (the largest that fits)" if result["micro_batch_size"] else ": does not fit")]
    lines.append(result["sources"])
    return "\n".join(lines)
