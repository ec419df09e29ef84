"""How numbers are written, on screen, in the card and on the report page: said once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PERCENT_METRICS = frozenset(
    ("acc", "acc_norm", "acc_bytes", "ended", "exact_match", "mc1", "mc2", "f1", "em", "mean of six", "average")
)
"""lm-eval metrics that are shares of one and are shown in percent; every other metric is shown as it is."""


METRIC_NAMES = {
    "acc": "accuracy",
    "acc_norm": "accuracy, length-normalised",
    "acc_bytes": "accuracy, byte-normalised",
    "ended": "ended within 60 tokens",
    "exact_match": "exact match",
    "bits_per_byte": "bits per byte",
    "byte_perplexity": "byte perplexity",
    "word_perplexity": "word perplexity",
    "answer_bits_per_byte": "right answer, bits per byte",
}


def metric_name(name: str) -> str:
    """A metric in words: `accuracy, length-normalised`; lm-eval's name where there are none."""
    return METRIC_NAMES.get(name, name)


def duration(seconds: float) -> str:
    """`41 s`, `4 min 10 s`, `3 h 05 min`, `2 d 4 h`: two units at most, the second rounded."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def size(count: float) -> str:
    """A large count with a unit: `2.4M`, `7.3B`, `850`."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g}{unit}"
    return f"{count:.0f}"


def file_size(count: float) -> str:
    """Bytes in decimal units: `461 MB`, `2.5 GB`, `12 kB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            value = count / scale
            return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{count:.0f} bytes"


def integer(value: float) -> str:
    """`1,234,567`."""
    return f"{value:,.0f}"


def decimal(value: float, places: int = 3) -> str:
    """A fixed number of decimals."""
    return f"{value:.{places}f}"


def percent(value: float, places: int = 1) -> str:
    """A share of one: `41.7 %`."""
    return f"{100 * value:.{places}f} %"


def figure(value: float) -> str:
    """Three significant digits, more before the point: `0.00987`, `51.2`, `1,460`."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def scale(metric: str) -> tuple[float, int]:
    """Factor and decimals in which a metric is shown: shares in percent with two, the rest as they are with four."""
    return (100.0, 2) if metric in PERCENT_METRICS else (1.0, 4)


def metric(value: float | None, name: str) -> str:
    """A metric's value, standard error or chance level in its unit; `-` where there is none."""
    factor, places = scale(name)
    return "-" if value is None else f"{factor * value:.{places}f}"


def score(entry: Mapping[str, Any] | None, name: str) -> str:
    """`39.84 ± 3.10`: an entry with `value` and `stderr` (or None) of metric `name`; empty without an entry."""
    if entry is None:
        return ""
    error = "" if entry["stderr"] is None else f" ± {metric(entry['stderr'], name)}"
    return metric(entry["value"], name) + error


def difference(entry: Mapping[str, Any], name: str) -> str:
    """`+0.1113 [+0.0850, +0.1380]`: a difference and its 95 % interval, where it has one."""
    factor, places = scale(name)
    value, *bounds = (f"{factor * number:+.{places}f}" for number in (entry["value"], *(entry["interval"] or ())))
    return value + (f" [{', '.join(bounds)}]" if bounds else "")


def p_value(value: float) -> str:
    """`0.012`, or `< 0.001`."""
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"
