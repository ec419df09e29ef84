"""`nanophi estimate`: time, memory, money, energy and emissions of a run, before any money is spent."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from nanophi.core import dial, formatting
from nanophi.core.errors import UserError
from nanophi.core.files import write_json
from nanophi.core.options import Json, OneRecipe, Overrides
from nanophi.core.recipe import Recipe, load_recipe
from nanophi.training.advice import advice
from nanophi.training.budget import DEVICES, Device, find_device, fitting_rows, flops_per_token, peak_bytes, uses_tf32

if TYPE_CHECKING:
    from nanophi.configuration_nanophi import NanoPhiConfig

ASSUMED_MFU = 0.40  # PaLM reached 0.46 (Chowdhery et al. 2022, table 3); a small model with a large vocabulary less
GRID_GRAMS_PER_KWH = 480.0  # of the world's average electricity in 2023 (Ember, Global Electricity Review 2024)
MEASURED_STEPS = 6
PUBLISHED_DEVICE, PUBLISHED_TOKENS, PUBLISHED_HOURS = "a100-40g", 14_000 * 512 * 1024, 52.0
"""The run of https://huggingface.co/kenhktsui/nano-phi-115M-v0.1, as its card gives it."""


def estimate(
    recipe: OneRecipe,
    device: Annotated[str, Option(help="a100-40g, a100-80g, h100, h200, l40s, l4, rtx-4090, ...")] = "a100-40g",
    devices: Annotated[int, Option(min=1, help="Number of devices.")] = 1,
    mfu: Annotated[float, Option(min=0.01, max=1, help="Share of the device's peak that is reached.")] = ASSUMED_MFU,
    price: Annotated[float | None, Option(min=0, help="Dollars per device-hour (default: built-in table).")] = None,
    grid: Annotated[float, Option(min=0, help="Grams of CO2e per kWh.")] = GRID_GRAMS_PER_KWH,
    measure: Annotated[bool, Option("--measure", help="Time a few steps here; --device names this machine.")] = False,
    overrides: Overrides = [],
    as_json: Json = False,
) -> None:
    """Estimate time, cost, energy and memory of a training run.

    The figures of the published run are shown beside them.

    Example: nanophi estimate nano-phi-115m --device h100
    """
    resolved, name = load_recipe(recipe, overrides), find_device(device)
    if resolved.conversations:
        raise UserError(
            f"{resolved.name} trains on conversations, whose tokens only packing knows; this is for pretraining"
        )
    speed = measured_speed(resolved, functools.partial(typer.echo, err=as_json)) if measure else None
    result = predict(resolved, DEVICES[name], devices, mfu, speed, price, grid)
    advised = advice(resolved, Path("runs") / resolved.name)
    if as_json:
        facts = {"recipe": resolved.name, "device": name, "devices": devices}
        typer.echo(json.dumps({**facts, **result, "advice": advised}))
        return
    typer.echo(render(resolved, f"{devices} x {name}" if devices > 1 else name, result))
    for key, value, reason in dial.explain(recipe, overrides):
        typer.echo(f"{key}: {value} ({reason})")
    for line in advised:
        typer.echo(line)


def predict(
    recipe: Recipe,
    device: Device,
    devices: int = 1,
    mfu: float = ASSUMED_MFU,
    tokens_per_second: float | None = None,
    dollars_per_hour: float | None = None,
    grams_per_kwh: float = GRID_GRAMS_PER_KWH,
) -> dict[str, Any]:
    """What the recipe's training takes on so many of a device, by a measured speed of all of them or by `mfu`.

    Energy is of board power all the time, without host and cooling; `peak_bytes` for one row and for
    `micro_batch_size`, the largest that fits (0: none does). `UserError` if the batch does not divide.
    """
    from nanophi.training.arguments import micro_batch_size

    config = recipe.model_config_for()
    training = recipe.training.model_copy(update={"precision": device.precision(recipe.training)})
    share = micro_batch_size(training.model_copy(update={"micro_batch_size": None}), devices)
    largest = fitting_rows(config, training, share, device.memory)
    flops = flops_per_token(config, config.max_position_embeddings)
    tokens = training.steps * training.batch_size * config.max_position_embeddings
    peak = device.peak(training.precision, uses_tf32(training)) * devices
    speed = mfu * peak / flops if tokens_per_second is None else tokens_per_second
    hours = tokens / speed / 3600
    kwh = hours * devices * device.watts / 1000
    price = device.dollars_per_hour if dollars_per_hour is None else dollars_per_hour
    return {
        "tokens": tokens,
        "tokens_per_second": speed,
        "mfu": speed * flops / peak,
        "hours": hours,
        "dollars": hours * devices * price,
        "kwh": kwh,
        "co2_grams": kwh * grams_per_kwh,
        "peak_bytes": {rows: peak_bytes(config, training, rows) for rows in sorted({1, largest or 1})},
        "micro_batch_size": largest,
        "sources": (
            f"speed: {'assumed' if tokens_per_second is None else 'measured'}; price: ${price:.2f} an hour, "
            f"{device.price_source if dollars_per_hour is None else 'as given'}"
        ),
    }


def published_run() -> dict[str, Any]:
    """The published model's own run, in the terms of `predict`."""
    speed = PUBLISHED_TOKENS / PUBLISHED_HOURS / 3600
    return predict(load_recipe("nano-phi-115m"), DEVICES[PUBLISHED_DEVICE], tokens_per_second=speed)


def write_random_tokens(run: Path, config: NanoPhiConfig, rows: int) -> None:
    """What training reads of a run directory: `rows` rows of random tokens for each split, and a tokenizer."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    length = config.max_position_embeddings
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (rows, length), np.int32)
    table = pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel()), length)})
    for split in ("train", "heldout"):
        Dataset(table).save_to_disk(str(run / "data/tokens" / split))
    counts = {"bytes_per_token": 4.0, "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
    write_json(run / "data/tokens/tokens.json", {"train": counts, "heldout": counts})
    (run / "data/tokenizer").mkdir()
    write_json(run / "data/tokenizer/tokenizer.json", {})


def measured_speed(recipe: Recipe, report: Callable[[str], None] = print) -> float:
    """Tokens per second of a few steps of `nanophi train` on this machine: one micro-batch each of random tokens."""
    from nanophi.training.trainer import train

    config = recipe.model_config_for(eos_token_id=0, bos_token_id=0)
    rows = recipe.training.micro_batch_size or min(recipe.training.batch_size, 4)
    update: dict[str, Any] = {"steps": MEASURED_STEPS, "batch_size": rows, "micro_batch_size": rows, "warmup_steps": 0}
    update |= {"save_steps": MEASURED_STEPS, "eval_steps": MEASURED_STEPS + 1, "logging_steps": 1, "keep_steps": []}
    update |= {"report_to": [], "track_energy": False, "spike_threshold": None}
    with tempfile.TemporaryDirectory(prefix="nanophi-estimate-") as folder:
        run = Path(folder) / "measuring"
        write_random_tokens(run, config, rows * MEASURED_STEPS)
        summary = train(run, recipe.training.model_copy(update=update), config, recipe.seed, report)
    return float(summary["tokens_per_second"])


def render(recipe: Recipe, name: str, result: dict[str, Any]) -> str:
    """`predict`'s result beside the published run, as plain text."""
    lines, published = [f"{recipe.name} on {name}, beside the published run (A100-40GB)", ""], published_run()
    rows: list[tuple[str, str, Callable[[float], str]]] = [
        ("tokens", "tokens", formatting.size),
        ("tokens/s", "tokens_per_second", formatting.integer),
        ("MFU", "mfu", formatting.percent),
        ("time", "hours", lambda hours: formatting.duration(3600 * hours)),
        ("dollars", "dollars", formatting.figure),
        ("kWh", "kwh", formatting.figure),
        ("kg CO2e", "co2_grams", lambda grams: formatting.figure(grams / 1000)),
    ]
    for title, key, written in rows:
        lines.append(f"{title:<10}{written(result[key]):>14}{written(published[key]):>14}")
    peaks = [f"{formatting.file_size(size)} with a micro-batch of {n}" for n, size in result["peak_bytes"].items()]
    fits = " (the largest that fits)" if result["micro_batch_size"] else ": does not fit"
    return "\n".join([*lines, "", f"memory: {', '.join(peaks)}{fits}", result["sources"]])
