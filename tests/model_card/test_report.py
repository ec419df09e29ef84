"""The report page: self-contained, harmless whatever the documents say, and alive in a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.model_card import report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ATTACK = "<script>document.title='taken over'</script><img src=x onerror=document.title='taken'>"
WAYS_OUT = [
    f"</script>{ATTACK}",
    f"</SCRIPT\t\n>{ATTACK}",
    f"</script/x>{ATTACK}",
    f"<!--<script>{ATTACK}",  # In this state the first end of a script does not end it.
    f"<!-- --!>--></script>{ATTACK}]]>",
    f"<\\/script>\\u003c/script>{ATTACK}",
    "\u2028\u2029\r\n\"'`${document.title='taken over'}\\",
    f"\ufeff\ufffe\uffff\x7f\x85\x1b[0m\u202e{ATTACK}",
    "/*DATA*/",
    "$& $1 $` $'",
]
HOSTILE = WAYS_OUT[0]


@pytest.fixture(scope="module")
def page(finished_run, tmp_path_factory):
    """The page of a run in which one document tries to break out."""
    run = tmp_path_factory.mktemp("report") / "tiny"
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("release", "card"))
    shard = run / "data" / "documents" / "train-00000.parquet"
    documents = pd.read_parquet(shard)
    documents["text"] = [f"{WAYS_OUT[row % len(WAYS_OUT)]}{text}" for row, text in enumerate(documents["text"])]
    documents.to_parquet(shard)
    training = read_json(run / "training.json")
    for entry in training["evaluations"]:
        entry["by_source"] = {"licences": entry["bits_per_byte"] + 0.1, HOSTILE: entry["bits_per_byte"] - 0.1}
    training["samples"] = [{"step": step, "text": f"The module {step}{HOSTILE}\ud800"} for step in (10, 20, 30)]
    training["summary"] |= {"energy_kwh": 0.25, "co2_grams": 105.2, "co2_source": "a meter", "cost_usd": 1.5}
    (run / "training.json").write_text(json.dumps(training))
    report.build(run, run / "report.html")
    return run / "report.html"


def data_of(page: Path) -> dict:
    assert page.read_text().lower().count("<script") == page.read_text().lower().count("</script") == 2
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


def test_the_sample_is_traced_where_the_tokens_are(finished_run, tmp_path, monkeypatch):
    assert report._trace(tmp_path) is None
    (tmp_path / "data/tokens/train").mkdir(parents=True)
    shutil.copyfile(finished_run / "sample.json", tmp_path / "sample.json")
    span = {"text": HOSTILE, "length": 7, "documents": 2, "examples": [{"source": "licences"}]}
    monkeypatch.setattr(report, "trace_text", lambda run, text: [span])
    assert report._trace(tmp_path) == [[HOSTILE, 7, 2, "licences"]]


def test_page_asks_for_nothing_from_outside(page):
    text = re.sub(r'<script type="application/json".*?</script>', "", page.read_text(), flags=re.DOTALL)
    outside = [link for link in re.findall(r"https?://[^\s\"'<>]+", text) if "www.w3.org" not in link]
    assert outside == []
    assert not re.search(r"<link|@import|src=|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text


def test_documents_cover_the_scores(page):
    documents = data_of(page)["documents"]
    scores = [entry["score"] for entry in documents]
    assert scores == sorted(scores) and scores[0] < 0.25 and scores[-1] > 0.9
    assert max(sum(int(score * 20) == number for score in scores) for number in range(20)) == report.DOCUMENTS_PER_BIN
    number = {entry["text"]: re.search(r"document (\d+): the", entry["text"]) for entry in documents}
    assert all(text.startswith(WAYS_OUT[int(match[1]) % len(WAYS_OUT)]) for text, match in number.items() if match)
    assert len({int(match[1]) % len(WAYS_OUT) for match in number.values() if match}) == len(WAYS_OUT)


def test_what_was_recorded_is_shown_and_nothing_else(page, finished_run, tmp_path):
    data = data_of(page)
    checkpoints = ["step-000010", "step-000020", "step-000030"]
    assert list(data["samples"]["checkpoints"]) == checkpoints
    assert [row["revision"] for row in data["scores"] if row["task"] == "heldout_continuation"] == checkpoints
    report.build(finished_run, tmp_path / "report.html")
    data = data_of(tmp_path / "report.html")
    assert data["written"] == [] and data["by_source"] is None
    assert [name for name, _ in data["facts"]][-1] == "seed"


def test_long_logs_are_thinned_and_keep_the_end():
    keys = ("loss", "learning_rate", "grad_norm", "tokens_seen", "tokens_per_second")
    log = [{"step": step, **dict.fromkeys(keys, 1.0)} for step in range(1, 2001)]
    thin = report._thinned(log)
    assert len(thin) <= report.MAX_POINTS and thin[-1]["step"] == 2000


def test_missing_scores_are_named(run_copy):
    (run_copy / "data/scores/scores.parquet").unlink()
    with pytest.raises(UserError, match=r"scores\.parquet is missing"):
        report.build(run_copy, run_copy / "report.html")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_page_works_in_a_browser(page, tmp_path):
    moved = page.with_name("moved.html")
    script = """<script>
const held = JSON.parse(document.getElementById("data").textContent).documents;
document.body.dataset.held = held.length;
for (const [id, value, event] of [["threshold", 0.8, "input"], ["which", "dropped", "input"], ["step", 1, "input"],
                                  ["curve", "bits per byte by source, held out", "change"]]) {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event(event));
}
</script></body>"""
    moved.write_text(page.read_text().replace("</body>", script))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    command = [str(BROWSER), *options, "--virtual-time-budget=3000", moved.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    dom = done.stdout
    assert 'data-ready="yes"' in dom, done.stderr[-2000:]
    assert "<title>tiny</title>" in dom
    assert f'data-held="{len(data_of(page)["documents"])}"' in dom
    above = int(re.search(r"above 0\.80: about (\d+) of 400 documents", dom).group(1))  # type: ignore[union-attr]
    table = pd.read_parquet(page.parent / "data" / "scores" / "scores.parquet")
    assert above == (table.quality_score > 0.8).sum()
    assert dom.count('class="document dropped"') == 8 and 'class="document"' not in dom
    outside_data = re.sub(r'<script type="application/json".*?</script>', "", dom, flags=re.DOTALL)
    assert "<img" not in outside_data and "&lt;img" in outside_data
    assert dom.count("<svg") == 2 + 1 + 2
    other = outside_data[outside_data.index('<div id="other">') : outside_data.index("<h2>Evaluation</h2>")]
    assert other.count("<path") == 2 and other.count("<circle") == 6 and "● licences" in other
    assert '>step 20</span><pre id="step-text"><strong>The module</strong> 20&lt;' in outside_data
    assert re.search(r"<b>energy</b>0\.25 kWh.*<b>CO2e</b>105 g.*<b>cost</b>1\.5 US dollars", outside_data)
