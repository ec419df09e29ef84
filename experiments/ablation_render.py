"""The answer of an ablation: its JSON, one plain paragraph, tables, and a forest plot.

Everything comes from the plan and the records in a folder; the statistics are `ablation.py`'s.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from nanophi.core import formatting, markup, plots
from nanophi.core.files import read_json, write_json, write_text
from nanophi.core.recipe import Recipe
from nanophi.eval import catalogue
from nanophi.experiments import ablation, records
from nanophi.training.budget import flops_per_token

ARMS = {
    "all": "all the text",
    "best": "the best share",
    "random": "a random share of the same size",
    "worst": "the worst share",
}
DIFFERENCES = {"better": "fewer", "worse": "more"}
TEMPLATE = Path(__file__).with_name("ablation.md")
CONTRAST_COLUMNS = (
    *("contrast", "learning rate", "difference [95 % interval]", "by seed", "seeds' part of the error", "p"),
    *("minimum detectable effect", "verdict (p, corrected)"),
)
RUN_COLUMNS = {
    **{"run": "{run}", "different tokens": "{unique_tokens:,}", "epochs": "{epochs:.2f}"},
    **{"tokens seen": "{tokens_seen:,}", "documents": "{documents:,}", "last loss": "{final_loss:.3f}"},
    "time": "{time}",
}
"""Column -> how a cell is made from a record."""


def write_answer(output: Path) -> dict[str, Any]:
    """`ablation.json`, `.md` and `.png` from the plan and the records in a folder; they may be moved or copied.

    Raises `UserError` if there is no record yet, or records whose items differ.
    """
    plan, items = read_json(output / "plan.json"), read_json(output / "items.json")
    contrasts = {name: arms.split(" - ") for name, arms in plan["contrasts"].items()}
    # What continues a trunk scatters less than full runs, and the trunk itself less again: it reads on in its own text.
    pools = [plan["branches"], ["all", *plan["branches"]]] if plan.get("branches") else []
    runs = records.read_records(output, ("arm", "seed", "learning_rate"), ablation.keys_of(plan))
    result: dict[str, Any] = {
        "format": plan["format"],
        "plan": {key: value for key, value in plan.items() if key != "recipe"},
        "name": plan["recipe"]["name"],
        "finished": len(runs),
        "flops": _flops(plan),
        "targets": ablation.analyse(ablation.targets(plan, items, runs), contrasts, pools),
        "runs": [{key: value for key, value in entry.items() if key not in ("items", "environment")} for entry in runs],
    }
    result["paragraph"] = paragraph(result)
    write_json(output / "ablation.json", result)
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True)
    tables = {"contrasts": _contrasts, "means": _means, "runs": _runs(result["runs"]), "text": markup.text}
    write_text(output / "ablation.md", template.render(result | tables))
    draw(result, output / "ablation.png")
    return result


def _flops(plan: Mapping[str, Any]) -> float:
    """Training FLOP of each run."""
    config = Recipe(**plan["recipe"]).model_config_for(vocab_size=plan["vocab_size"])
    return float(plan["tokens_seen"] * flops_per_token(config, config.max_position_embeddings))


def paragraph(result: Mapping[str, Any]) -> str:
    """The answer on the primary target in plain sentences."""
    plan = result["plan"]
    target = next(entry for entry in result["targets"].values() if entry["primary"])
    size = {arm: formatting.size(count) for arm, count in plan["tokens"].items()}
    total = len(plan["arms"]) * len(plan["seeds"]) * len(plan["learning_rates"])
    works = ""
    if target["check"]["verdict"] == "better":
        works = " The measurement works: the best share beats the worst."
    elif target["check"]["p_value"] is not None:
        works = (
            " The measurement did not tell the best share from the worst: it may be too coarse to answer the question."
        )
    read = f"a share of {size['best']} different tokens {plan['epochs']['best']:.1f} times"
    if plan.get("branches"):
        read = f"until the learning rate decays all the text, then {read}"
    return (
        (f"Unfinished: {result['finished']} of {total} runs are done. " if result["finished"] < total else "")
        + f"The filter keeps {formatting.percent(plan['share'])} of the training text (rule: {plan['rule']}). "
        f"Every run saw {formatting.size(plan['tokens_seen'])} tokens: {read}, "
        f"or {size['all']} of all the text {plan['epochs']['all']:.1f} times. "
        f"Measured on {target['title']} (fixed in advance; bits per byte, lower is better): "
        f"{'; '.join(_sentence(entry) for entry in target['contrasts'].values())}.{works} "
        f"Each run took {result['flops']:.1g} FLOP; published work found that decisions transfer to larger models from "
        "about 1e16 FLOP upwards (DataDecide, arXiv 2504.11393: smallest model 9e15)."
    )


def _sentence(entry: Mapping[str, Any]) -> str:
    (ours, theirs), verdict = (ARMS.get(arm, arm) for arm in entry["arms"]), entry["verdict"]
    rates = {rate: one for rate, one in entry["learning_rates"].items() if one["value"] is not None}
    values = ", ".join(f"{_difference(one)} at learning rate {float(rate):g}" for rate, one in rates.items())
    if verdict in DIFFERENCES:
        p_value = formatting.p_value(entry["p_corrected"])
        p_value = p_value if p_value.startswith("<") else f"= {p_value}"
        return f"{ours} needs {DIFFERENCES[verdict]} bits than {theirs} ({values}; p {p_value})"
    if verdict == "at one learning rate only":
        return f"{ours} and {theirs} differ at one learning rate only, so nothing is claimed ({values})"
    if verdict == "not found":
        effect = formatting.figure(max(one["minimum_detectable_effect"] for one in rates.values()))
        found = f"no difference was found between {ours} and {theirs}"
        return f"{found} ({values}; one of {effect} would probably have been)"
    return f"{ours} and {theirs} are not compared yet ({verdict}{'; ' + values if values else ''})"


def _difference(one: Mapping[str, Any]) -> str:
    return "" if one["value"] is None else catalogue.difference(one, "bits_per_byte")


def _contrasts(target: Mapping[str, Any]) -> str:
    rows = []
    for name, found in {**target["contrasts"], "check": target["check"]}.items():
        corrected = "" if found["p_corrected"] is None else f" ({formatting.p_value(found['p_corrected'])})"
        for rate, one in found["learning_rates"].items():
            p_value, effect = one["p_value"], one["minimum_detectable_effect"]
            part = one["stderr"] and formatting.percent(one["seed_stderr"] ** 2 / one["stderr"] ** 2, 0)
            rows.append([
                f"{name}: {' - '.join(found['arms'])}",
                f"{float(rate):g}",
                _difference(one),
                ", ".join(f"{value:+.4f}" for value in one["by_seed"]),
                part or "",
                "" if p_value is None else formatting.p_value(p_value),
                "" if effect is None else formatting.figure(effect),
                f"{found['verdict']}{corrected}",
            ])  # fmt: skip
    return markup.table(CONTRAST_COLUMNS, rows)


def _means(target: Mapping[str, Any], arms: Sequence[str]) -> str:
    values = target["values"].items()
    rows = [[f"{float(rate):g}", *(f"{of[arm]:.4f}" if arm in of else "" for arm in arms)] for rate, of in values]
    return markup.table(["learning rate", *arms], rows)


def _runs(runs: Sequence[Mapping[str, Any]]) -> str:
    own = [{**run, "epochs": run.get("decay_epochs", run["epochs"])} for run in runs]  # of the text that is its own
    timed = [{**run, "time": formatting.duration(run["seconds"])} for run in own]
    return markup.table(list(RUN_COLUMNS), [[cell.format(**run) for cell in RUN_COLUMNS.values()] for run in timed])


def draw(result: Mapping[str, Any], path: Path) -> None:
    """A forest plot: each target's contrasts at each learning rate with their 95 % intervals, and zero."""
    targets = list(result["targets"].values())
    rates = [str(rate) for rate in result["plan"]["learning_rates"]]
    with plots.picture(path, 9, 1.2 + 1.7 * len(targets)) as figure:
        panels = figure.subplots(len(targets), 1, squeeze=False)[:, 0]
        for axes, target in zip(panels, targets, strict=True):
            _draw_target(axes, target, rates)
        panels[-1].set_xlabel(
            "difference in bits per byte, 95 % interval; ticks: single seeds; left of zero: the first arm is better"
        )
        for rate, colour in zip(rates, plots.SERIES, strict=False):
            panels[0].plot([], [], "o-", color=colour, label=f"learning rate {float(rate):g}")
        figure.legend(loc="outside upper right", ncols=len(rates))  # where it covers nothing


def _draw_target(axes: Any, target: Mapping[str, Any], rates: list[str]) -> None:
    contrasts = {**target["contrasts"], "check": target["check"]}
    for row, found in enumerate(contrasts.values()):
        for number, rate in enumerate(rates):
            one = found["learning_rates"].get(rate)
            if one is None or one["value"] is None:
                continue
            height = row + (number - (len(rates) - 1) / 2) * 0.36 / max(1, len(rates) - 1)
            colour = plots.SERIES[number % len(plots.SERIES)]
            axes.plot(one["by_seed"], [height] * len(one["by_seed"]), "|", color=colour, alpha=0.5, markersize=7)
            if one["interval"]:
                axes.plot(one["interval"], [height, height], color=colour, linewidth=2)
            axes.plot(one["value"], height, "o", color=colour, markersize=6)
        weight = "bold" if found["verdict"] in DIFFERENCES else "normal"
        beside = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 9, "weight": weight}
        axes.annotate(found["verdict"].split(":")[0], (1.01, row), **beside)
    axes.set_yticks(range(len(contrasts)), [f"{name}: {' - '.join(one['arms'])}" for name, one in contrasts.items()])
    axes.set_ylim(len(contrasts) - 0.4, -0.6)
    axes.axvline(0, color=plots.DARK, linewidth=0.8)
    kind = "primary" if target["primary"] else "secondary"
    axes.set_title(f"{target['title'][0].upper()}{target['title'][1:]} ({kind})", loc="left")
