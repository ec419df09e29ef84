"""An ablation for the eye: one plain paragraph, tables, and a forest plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanophi.core import formatting
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json, write_text
from nanophi.experiments import ablation

ARMS = {
    "all": "all the text",
    "best": "the best share",
    "random": "a random share of the same size",
    "worst": "the worst share",
}
DIFFERENCES = {"better": "fewer", "worse": "more"}
RATE_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd")


def write_answer(output: Path) -> dict[str, Any]:
    """`ablation.json`, `.md` and `.png` from the plan and the records in a folder; they may be moved or copied.

    Raises:
        UserError: if there is no record yet, or records whose items differ.
    """
    plan, items = read_json(output / "plan.json"), read_json(output / "items.json")
    records = [read_json(path) for path in sorted((output / "records").glob("*.json"))]
    if not records:
        raise UserError(f"{output} holds no record of a finished run; run `nanophi ablate` again")
    result: dict[str, Any] = {
        "format": plan["format"],
        "plan": {key: value for key, value in plan.items() if key != "recipe"},
        "name": plan["recipe"]["name"],
        "finished": len(records),
        "targets": ablation.analyse(ablation.targets(plan, items, records)),
        "runs": [
            {key: value for key, value in entry.items() if key not in ("items", "environment")} for entry in records
        ],
    }
    write_json(output / "ablation.json", result)
    write_text(output / "ablation.md", to_markdown(result))
    draw(result, output / "ablation.png")
    return result


def paragraph(result: Mapping[str, Any]) -> str:
    """The answer on the primary target in plain sentences."""
    plan = result["plan"]
    target = next(entry for entry in result["targets"].values() if entry["primary"])
    tokens, epochs = plan["tokens"], plan["epochs"]
    sentences = [
        f"The filter keeps {formatting.percent(plan['share'])} of the training text (rule: {plan['rule']}).",
        f"Every run saw {formatting.size(plan['tokens_seen'])} tokens: a share of {formatting.size(tokens['best'])} "
        f"different tokens {epochs['best']:.1f} times, or {formatting.size(tokens['all'])} of all the text "
        f"{epochs['all']:.1f} times.",
        f"Measured on {target['title']} (fixed in advance; bits per byte, lower is better):",
    ]
    sentences.append("; ".join(_sentence(entry) for entry in target["contrasts"].values()) + ".")
    check = target["check"]
    if check["verdict"] == "better":
        sentences.append("The measurement works: the best share beats the worst.")
    elif check["p_value"] is not None:
        sentences.append(
            "The measurement did not tell the best share from the worst: it may be too coarse to answer the question."
        )
    total = len(plan["arms"]) * len(plan["seeds"]) * len(plan["learning_rates"])
    if result["finished"] < total:
        sentences.insert(0, f"Unfinished: {result['finished']} of {total} runs are done.")
    return " ".join(sentences)


def _sentence(entry: Mapping[str, Any]) -> str:
    ours, theirs = (ARMS[arm] for arm in entry["arms"])
    rates = {rate: one for rate, one in entry["learning_rates"].items() if one["value"] is not None}
    values = ", ".join(f"{difference(one)} at learning rate {float(rate):g}" for rate, one in rates.items())
    if entry["verdict"] in DIFFERENCES:
        more = DIFFERENCES[entry["verdict"]]
        return f"{ours} needs {more} bits than {theirs} ({values}; p {_p(entry['p_corrected'])})"
    if entry["verdict"] == "at one learning rate only":
        return f"{ours} and {theirs} differ at one learning rate only, so nothing is claimed ({values})"
    if entry["verdict"] == "not found":
        effect = formatting.figure(max(one["minimum_detectable_effect"] for one in rates.values()))
        return (
            f"no difference was found between {ours} and {theirs} ({values}; one of {effect} would probably have been)"
        )
    return f"{ours} and {theirs} are not compared yet ({entry['verdict']}{'; ' + values if values else ''})"


def difference(one: Mapping[str, Any]) -> str:
    """`-0.1029 [-0.1423, -0.0635]`: a contrast and its 95 % interval, if it has one."""
    interval = one["interval"]
    return f"{one['value']:+.4f}" + (f" [{interval[0]:+.4f}, {interval[1]:+.4f}]" if interval else "")


def _p(value: float) -> str:
    text = formatting.p_value(value)
    return text if text.startswith("<") else f"= {text}"


def to_markdown(result: Mapping[str, Any]) -> str:
    """The whole answer: paragraph, figure, contrasts of all targets, means by arm, runs, method."""
    plan = result["plan"]
    lines = [f"# Does the filter help? {result['name']}", "", paragraph(result), "", "![Forest plot](ablation.png)"]
    for name, entry in result["targets"].items():
        kind = "primary target" if entry["primary"] else "secondary target"
        lines += ["", f"## {_capital(entry['title'])} ({kind})", ""]
        if name in ("kept", "dropped"):
            lines += ["The selection itself defines this text, so a difference on it is expected.", ""]
        lines += ["| contrast | learning rate | difference [95 % interval] | by seed | seeds' part of the error | p "
                  "| minimum detectable effect | verdict (p, corrected) |",
                  "|---|---:|---:|---:|---:|---:|---:|---|"]  # fmt: skip
        for contrast, tested in {**entry["contrasts"], "check": entry["check"]}.items():
            corrected = "" if tested["p_corrected"] is None else f" ({formatting.p_value(tested['p_corrected'])})"
            verdict = f"{tested['verdict']}{corrected}"
            for rate, one in tested["learning_rates"].items():
                p_value = "" if one["p_value"] is None else formatting.p_value(one["p_value"])
                lines.append(
                    f"| {contrast}: {' - '.join(tested['arms'])} | {float(rate):g} "
                    f"| {'' if one['value'] is None else difference(one)} "
                    f"| {', '.join(f'{value:+.4f}' for value in one['by_seed'])} "
                    f"| {_share_of_seeds(one)} | {p_value} "
                    f"| {_figure(one['minimum_detectable_effect'])} | {verdict} |"
                )
        lines += ["", f"| learning rate | {' | '.join(plan['arms'])} |", "|---|" + "---:|" * len(plan["arms"])]
        for rate, values in entry["values"].items():
            cells = [f"{values[arm]:.4f}" if arm in values else "" for arm in plan["arms"]]
            lines.append(f"| {float(rate):g} | {' | '.join(cells)} |")
        lines += ["", f"Means over seeds, bits per byte, of {' and '.join(map(str, entry['items']))} items."]
    lines += ["", "## Runs", "", "| run | different tokens | epochs | tokens seen | documents | last loss | time |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for run in result["runs"]:
        lines.append(
            f"| {run['run']} | {run['unique_tokens']:,} | {run['epochs']:.2f} | {run['tokens_seen']:,} "
            f"| {run['documents']:,} | {run['final_loss']:.3f} | {formatting.duration(run['seconds'])} |"
        )
    lines += ["", "## Method", "", plan["test"], "", f"Planned {plan['planned']}, before anything was trained."]
    return "\n".join(lines) + "\n"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _figure(value: float | None) -> str:
    return "" if value is None else formatting.figure(value)


def _share_of_seeds(one: Mapping[str, Any]) -> str:
    """How much of the variance comes from the seeds."""
    if not one["stderr"]:
        return ""
    return formatting.percent(one["seed_stderr"] ** 2 / one["stderr"] ** 2, 0)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """A forest plot, PNG: each target's contrasts at each learning rate with their 95 % intervals, and zero."""
    from matplotlib.figure import Figure

    targets = list(result["targets"].values())
    rates = [str(rate) for rate in result["plan"]["learning_rates"]]
    names = [*targets[0]["contrasts"], "check"]
    figure = Figure(figsize=(9, 1.2 + 1.7 * len(targets)), layout="constrained")
    axes = figure.subplots(len(targets), 1, sharex=False, squeeze=False)[:, 0]
    step = 0.6 / max(1, len(rates) - 1)
    for axis, target in zip(axes, targets, strict=True):
        contrasts = {**target["contrasts"], "check": target["check"]}
        for row, name in enumerate(names):
            for number, rate in enumerate(rates):
                one = contrasts[name]["learning_rates"].get(rate)
                if one is None or one["value"] is None:
                    continue
                place = row + (number - (len(rates) - 1) / 2) * step * 0.6
                colour = RATE_COLOURS[number % len(RATE_COLOURS)]
                axis.plot(one["by_seed"], [place] * len(one["by_seed"]), "|", color=colour, alpha=0.5, markersize=7)
                if one["interval"]:
                    axis.plot(one["interval"], [place, place], color=colour, linewidth=2)
                axis.plot(one["value"], place, "o", color=colour, markersize=6)
        labels = [f"{name}: {' - '.join(contrasts[name]['arms'])}" for name in names]
        axis.set_yticks(range(len(names)), labels, fontsize=9)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.axvline(0, color="black", linewidth=0.8)
        for row, name in enumerate(names):
            verdict = contrasts[name]["verdict"]
            bold = "bold" if verdict in DIFFERENCES else "normal"
            axis.annotate(
                verdict.split(":")[0],
                (1.01, row),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
                weight=bold,
            )
        kind = "primary" if target["primary"] else "secondary"
        axis.set_title(f"{_capital(target['title'])} ({kind})", loc="left", fontsize=10)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(
        "difference in bits per byte, 95 % interval; ticks: single seeds; left of zero: the first arm is better"
    )
    for number, rate in enumerate(rates):
        axes[0].plot(
            [], [], "o-", color=RATE_COLOURS[number % len(RATE_COLOURS)], label=f"learning rate {float(rate):g}"
        )
    # Outside the axes, so that it covers nothing.
    figure.legend(loc="outside upper right", fontsize=8, frameon=False, ncols=len(rates))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    figure.savefig(partial, format="png", dpi=130, metadata={"Software": None})
    partial.replace(path)
