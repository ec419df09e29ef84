"""The page that runs a model in the browser: pushed to the loopback Hub, and opened in a real Chromium.

What it writes is compared with llama.cpp itself on the same file, which comes from npm as the page's library does.
"""

import json
import os
import shutil
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from browser import BROWSER, Site, library, npm, visit  # type: ignore[import-not-found]
from chat_run import on_finished  # type: ignore[import-not-found]
from hub_client import is_whole, push  # type: ignore[import-not-found]
from hub_server import HubServer  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from nanophi.core import markup
from nanophi.core.errors import UserError
from nanophi.eval.models import model_sha256
from nanophi.model_card import gguf, space
from nanophi.model_card.records import read_records

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
LLAMA_CPP = ("node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1")
GREEDY = "set({temperature: 0, repeat_penalty: 1, max_tokens: 40, prompt: %s}); await generate(); return shown();"
NEARLY = 1.1  # times as likely: on other processors the products of quantized numbers are added up in other orders
ATTACK = "<img src=x onerror=document.title='taken'><script>document.title='taken'</script>"


def ascii_text(text: str) -> bool:
    return text.isascii() and text.isprintable() and text != ""


def biased(
    release: Path,
    file: Path,
    weights: Path,
    likely: str | None = None,
    allowed: Callable[[str], bool] = ascii_text,
) -> Path:
    """A q8_0 file of a release with other weights, which writes `allowed` tokens alone, or `likely` always.

    By default printable ASCII: bytes that are no text are shown by each program in a way of its own.
    """
    folder = Path(shutil.copytree(release, file.with_suffix("")))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if likely is not None:  # in place of the last token that was made
        content = json.loads(tokenizer.to_str())
        last = "".join(content["model"]["merges"].pop())
        assert content["model"]["vocab"].pop(last) == tokenizer.get_vocab_size() - 1
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.add_tokens([AddedToken(likely, normalized=False)])
        tokenizer.save(str(folder / "tokenizer.json"))
    tensors = load_file(weights)
    bias = tensors["lm_head.bias"]
    for number in range(len(bias)):
        text = tokenizer.decode([number], skip_special_tokens=True)
        bias[number] += 0 if allowed(text) else -100
    if likely is not None:
        bias[tokenizer.token_to_id(likely)] = 200
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    gguf.write(folder, file, "q8_0")
    return file


def llama_cpp(file: Path, prompt: str, tokens: int = 40) -> tuple[list[str], list[float]]:
    """Greedy pieces of text by llama.cpp, and how likely the best token of each place was over the second best."""
    modules, script = npm(*LLAMA_CPP), Path(__file__).parents[1] / "greedy.mjs"
    command = ["node", str(script), str(modules), str(file), prompt, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    pieces, ratios = json.loads(done.stdout.splitlines()[-1])
    return pieces, ratios


def same_tokens(text: str, file: Path, prompt: str) -> int:
    """Of how many tokens the text is llama.cpp's; where it is not, the two likeliest tokens were nearly as likely."""
    pieces, ratios = llama_cpp(file, prompt)
    assert len(pieces) > 5
    place = 0
    for number, (piece, ratio) in enumerate(zip(pieces, ratios, strict=True)):
        if not text.startswith(piece, place):
            assert ratio < NEARLY, (text, pieces)
            return number
        place += len(piece)
    assert place == len(text)
    return len(pieces)


@pytest.fixture(scope="module")
def files(built_release, tmp_path_factory):
    """The q8_0 files of a model and of its control."""
    folder = tmp_path_factory.mktemp("files")
    steps = {"demo": "step-000030", "control": "step-000010"}
    weights = {name: built_release.parent / "checkpoints" / step / "model.safetensors" for name, step in steps.items()}
    made = {name: biased(built_release, folder / f"{name}.gguf", path) for name, path in weights.items()}
    (folder / "damaged.gguf").write_bytes(made["demo"].read_bytes()[:20_000])
    return made


@pytest.fixture
def hub(hub, no_branches, monkeypatch):
    monkeypatch.setattr(space, "LIBRARY", "/library")
    return hub


def file_of(hub: HubServer, kind: str, name: str, file: str) -> str:
    return hub.repositories[kind, name].branches["main"].files[file].data.decode()


def publish(release: Path, hub: HubServer, **options) -> str:
    """Push a release as org/demo with its page; returns the page."""
    push(release, "org/demo", space=True, gguf=["q8_0"], public=True, **options)
    return file_of(hub, "space", "org/demo-demo", "index.html")


def replace(hub: HubServer, name: str, file: Path) -> None:
    """Put other contents into the GGUF file that a push made."""
    repository = hub.add_repository("model", f"org/{name}-GGUF", {f"{name}-q8_0.gguf": file.read_bytes()})
    repository.tags = dict.fromkeys(repository.tags, repository.branches["main"])


def test_the_space_the_card_and_the_collection_name_each_other(built_release, hub):
    hub.add_repository("model", "org/control", {})
    page = publish(built_release, hub, control="org/control", collection="Nano")
    repository = hub.repositories["space", "org/demo-demo"]
    assert is_whole(repository.branches["main"]) and repository.tags["v1.0"] is repository.branches["main"]
    assert not repository.private and set(repository.branches["main"].files) >= {"index.html", "README.md"}
    head = yaml.safe_load(file_of(hub, "space", "org/demo-demo", "README.md").split("---\n")[1])
    assert (head["sdk"], head["app_file"]) == ("static", "index.html")
    assert head["models"] == ["org/demo", "org/control"] and head["license"] == "apache-2.0"
    card = file_of(hub, "model", "org/demo", "README.md")
    assert "**Try it in the browser:** [org/demo-demo](https://huggingface.co/spaces/org/demo-demo)" in card
    (collection,) = hub.collections.values()
    assert ("space", "org/demo-demo") in [(item["type"], item["id"]) for item in collection["items"]]
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [model["url"] for model in data["models"]] == [
        f"{hub.endpoint}/org/demo-GGUF/resolve/v1.0/demo-q8_0.gguf",
        f"{hub.endpoint}/org/control-GGUF/resolve/main/control-q8_0.gguf",
    ]
    assert list(data["facts"]) == ["parameters", "tokens seen", "text kept by the filter", "held-out bits per byte"]
    records = read_records(built_release / "records")
    assert f"{100 * records['quality.json']['kept_bytes_fraction']:.1f} %" in data["facts"].values()
    assert data["links"]["card"] == f"{hub.endpoint}/org/demo" and data["template"] is None
    before = len(hub.requests)
    publish(built_release, hub, control="org/control")
    assert not [line for line in hub.requests[before:] if "/commit/" in line]
    # The page changes when the card comes to link more; the tag stays.
    publish(built_release, hub, control="org/other")
    assert "org/other" in file_of(hub, "space", "org/demo-demo", "index.html")


@needs_browser
def test_two_models_write_what_llama_cpp_writes(built_release, hub, files, tmp_path):
    page = publish(built_release, hub, control="org/control")
    for name, file in files.items():
        replace(hub, name, file)
    prompt = "A lazy fox jumps over the"
    demo, control = visit(Site(page, GREEDY % json.dumps(prompt), library()), tmp_path / "profile")
    for found, name in ((demo, "demo"), (control, "control")):
        assert found["name"] == f"org/{name}" and not found["error"], found
        assert found["note"].startswith("40 tokens, ")
        (text,) = found["text"]
        assert text.startswith(prompt)
        same = same_tokens(text.removeprefix(prompt), files[name], prompt)
        assert same == 40 or name == "control"  # it has near ties
    assert demo["text"] != control["text"]


@needs_browser
def test_settings_stop_and_the_choice_of_models(built_release, files, tmp_path):
    page = space.page(built_release, {name: f"{name}.gguf" for name in files}, {}, "/library")
    script = """
set({temperature: 1, repeat_penalty: 1.3, max_tokens: 30, seed: 5, prompt: "The"});
const texts = [];
for (const seed of [5, 5, 6]) { set({seed}); await generate(); texts.push(shown()[0].text[0]); }
byId("beside").click();
set({max_tokens: 2000});
const long = generate();
await until(() => document.querySelector("section pre").textContent.length > 20);
byId("stop").click(); await long;
return {texts, stopped: shown()};
"""
    found = visit(Site(page, script, library(), files["demo"].parent), tmp_path / "profile")
    first, second, third = found["texts"]
    assert first == second != third
    (stopped,) = found["stopped"]  # the other one is hidden
    assert stopped["note"].split()[1] == "tokens," and len(stopped["text"][0]) < 1500


@needs_browser
def test_parts_of_characters_become_whole_ones_and_a_new_file_is_loaded(built_release, files, tmp_path):
    """By a model that writes nothing but single bytes of longer characters; the same reader then meets another one."""
    file = tmp_path / "model.gguf"
    biased(built_release, file, built_release / "model.safetensors", allowed=lambda text: "\ufffd" in text)
    page = space.page(built_release, {"demo": file.name}, {}, "/library")
    script = GREEDY % '"The "'
    site = Site(page, script, library(), tmp_path)
    (first,) = visit(site, tmp_path / "profile")
    written = first["text"][0].removeprefix("The ")
    assert not first["error"] and first["note"].startswith("40 tokens, "), first
    assert 10 < len(written) <= 20 and "\ufffd" not in written and not written.isascii()
    shutil.copyfile(files["demo"], file)
    script = "set({seed: ''}); await generate(); set({seed: 1}); const empty = shown();" + script.replace(
        "shown()", "[empty, shown()]"
    )
    site = Site(page, script, library(), tmp_path, port=site.server.server_port)
    (untouched,), (second,) = visit(site, tmp_path / "profile")
    assert untouched["text"] == [] and second["text"][0].isascii() and len(second["text"][0]) > 10


@needs_browser
def test_hostile_text_stays_text(built_release, tmp_path):
    weights = built_release / "model.safetensors"
    biased(built_release, tmp_path / "hostile.gguf", weights, likely=ATTACK)
    page = space.page(built_release, {ATTACK: "hostile.gguf"}, {ATTACK: "javascript:0"}, "/library")
    script = GREEDY.replace("return shown();", "").replace("40", "3") % markup.script_safe(f"</pre>{ATTACK}")
    script += "return {shown: shown(), images: document.images.length, title: document.title};"
    found = visit(Site(page, script, library(), tmp_path), tmp_path / "profile")
    assert found["images"] == 0 and found["title"] == "tiny"
    (column,) = found["shown"]
    assert column["name"] == ATTACK and column["text"] == [f"</pre>{ATTACK}{3 * ATTACK}"]


@pytest.fixture(scope="module")
def chat(finished_run, tmp_path_factory):
    """A chat model's run."""
    run = on_finished(finished_run, tmp_path_factory.mktemp("chat"), "org/base")
    run.make("release")
    return run.path / "release"


@pytest.mark.slow
@needs_browser
def test_a_chat_model_is_asked_in_its_template_and_turns_are_kept(chat, hub, tmp_path):
    page = publish(chat, hub)
    file = biased(chat, tmp_path / "chat.gguf", chat / "model.safetensors")
    replace(hub, "demo", file)
    replace(hub, "base", file)
    script = (GREEDY % '"Tell me."').replace("return shown();", "")
    script += """
set({prompt: "Again?"}); await generate();
const kept = shown();
byId("again").click();
const cleared = generate();  // while it writes, and before it has
await until(() => [...document.querySelectorAll("section pre")].at(-1)?.textContent.length > 3);
byId("again").click(); await cleared;
byId("go").click(); byId("stop").click(); await until(() => !byId("go").disabled);
set({prompt: "Tell me."}); await generate();
return [kept, shown()];
"""
    found, later = visit(Site(page, script, library()), tmp_path / "profile")
    assert [column["name"] for column in found] == ["org/demo", "org/base"]
    assert all(column["text"] == ["Again?", "", *found[0]["text"][:2]] for column in later), later
    assert found[0]["text"] == found[1]["text"]  # the base is asked in the same template
    first, answer, second, again = found[0]["text"]
    assert (first, second) == ("Tell me.", "Again?")
    tokenizer = AutoTokenizer.from_pretrained(chat)
    talked = [{"role": "user", "content": first}]
    for text in (answer, again):
        prompt = tokenizer.apply_chat_template(talked, tokenize=False, add_generation_prompt=True)
        assert same_tokens(text, file, prompt) > 5
        talked += [{"role": "assistant", "content": text}, {"role": "user", "content": second}]


@needs_browser
@pytest.mark.parametrize(
    ("models", "packages", "options", "sentence"),
    [
        ({"demo": "missing.gguf"}, "library", [], "missing.gguf: the file is missing or private, or there is no net"),
        ({"demo": "damaged.gguf"}, "library", [], "llama.cpp has crashed: its file is damaged, its text is"),
        ({"demo": "demo.gguf"}, "empty", [], 'For use without a network, run "npm install @wllama/wllama@'),
        ({"demo": "demo.gguf"}, "library", ["--js-flags=--jitless"], "This browser has no WebAssembly"),
    ],
    ids=["no file", "damaged file", "no library", "no WebAssembly"],
)
def test_what_is_missing_is_a_sentence(models, packages, options, sentence, built_release, files, tmp_path):
    page = space.page(built_release, models, {}, "/library")
    script = 'if (!byId("go").disabled) await generate(); return shown();'
    folder = library() if packages == "library" else tmp_path
    (found,) = visit(Site(page, script, folder, files["demo"].parent), tmp_path / "profile", *options)
    assert found["error"] and sentence in found["note"] and found["note"].endswith((".", "it."))


def compared(folder: Path, release: Path) -> Path:
    """A folder of runs: `tiny`, which was compared with `ctl`."""
    runs, trained = folder / "runs", "checkpoints/step-000030"
    for name in ("tiny", "ctl"):
        shutil.copytree(release, runs / name / "release")
    shutil.copytree(release.parent / trained, runs / "ctl" / trained)
    identity = {"name": "ctl", "sha256": model_sha256(runs / "ctl" / trained)}
    comparison = {"baseline": "ctl", "models": {"ctl": [identity]}}
    (runs / "tiny/release/records/comparison.json").write_text(json.dumps(comparison))
    return runs


@needs_browser
def test_show_serves_the_page_from_local_files(built_release, tmp_path, monkeypatch):
    """With the package that was installed before, so that no network is needed; the report is beside it."""
    runs = compared(tmp_path, built_release)
    (runs / "tiny/report.html").write_text("the report")
    (tmp_path / "node_modules").symlink_to(library().parents[1])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site").mkdir()
    space.write_site(runs / "tiny/release", tmp_path / "site")
    page = tmp_path / "site/index.html"
    script = (GREEDY % '"The"').replace("return", "await until(() => self.crossOriginIsolated); return")
    site = Site(page.read_text(), script, tmp_path)
    page.write_text(site.page)
    with space.serve(tmp_path / "site") as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        found = visit(site, tmp_path / "profile", url=url)
        assert urllib.request.urlopen(f"{url}report.html").read() == b"the report"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(url, headers={"Host": "evil.example"}))
        for name in ("localhost", "127.0.0.1:8080"):  # a port that is forwarded here
            urllib.request.urlopen(urllib.request.Request(url, headers={"Host": name})).close()
        server.shutdown()
    assert [column["name"] for column in found] == ["tiny", "ctl"] and not any(column["error"] for column in found)
    assert found[0]["text"] == found[1]["text"] and len(found[0]["text"][0]) > 10
    assert '"links": {"report": "report.html"}' in page.read_text()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({}, ["tiny", "ctl"]),
        ({"models": {"ctl": [{"name": "ctl", "sha256": "d" * 64}]}}, ["tiny"]),
        ({"baseline": "tiny"}, ["tiny"]),
        *(({"baseline": odd}, ["tiny"]) for odd in ("", "..", "/etc", 5, ["ctl"], "lost")),
    ],
)
def test_show_puts_beside_a_model_only_what_it_was_compared_with(
    change, names, built_release, tmp_path, monkeypatch, capsys
):
    """Here with a package of another version installed, which is not taken."""
    runs = compared(tmp_path, built_release)
    record = runs / "tiny/release/records/comparison.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    (tmp_path / "node_modules/@wllama/wllama").mkdir(parents=True)
    (tmp_path / "node_modules/@wllama/wllama/package.json").write_text('{"version": "2.0.0"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gguf, "write", lambda release, file, kind: file.touch())
    space.write_site(runs / "tiny/release", tmp_path)
    data = json.loads((tmp_path / "index.html").read_text().split('id="data">')[1].split("</script>")[0])
    told = capsys.readouterr().out
    assert [model["name"] for model in data["models"]] == names and data["library"] == space.LIBRARY
    assert f"has version 2.0.0, so the page loads {space.LIBRARY}; run `npm install {space.PACKAGE}`" in told
    assert ("is left out" in told) == (names == ["tiny"] and change != {"baseline": "tiny"})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_show_removes_its_copies_when_it_is_ended(number, built_release, tmp_path, monkeypatch):
    made = []

    def serve(folder: Path) -> None:
        made.append(folder)
        assert signal.getsignal(number) != signal.SIG_DFL, "the process would end here"
        os.kill(os.getpid(), number)

    monkeypatch.setattr(space, "serve", serve)
    monkeypatch.setattr(space, "write_site", lambda release, folder: (folder / "0.gguf").touch())
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt):
            space.show(str(built_release))
    finally:
        signal.signal(number, before)
    assert made and not made[0].exists()


def test_show_says_that_a_run_has_not_finished(tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/record.json").write_text('{"stages": {}}')
    with pytest.raises(UserError, match="begun is a run that has not finished; run `nanophi run` on its recipe"):
        space.show(str(tmp_path / "begun"))


@pytest.mark.parametrize("option", ["control", "new_version"])
def test_a_model_is_not_its_own_control_or_successor(option, built_release):
    with pytest.raises(UserError, match="org/demo is the model itself; name another one"):
        push(built_release, "org/demo", dry_run=True, **{option: "org/demo"})


def test_the_docs_name_the_version_that_the_page_loads():
    docs = (Path(space.__file__).parents[1] / "docs/publish.md").read_text()
    assert f"npm install {space.PACKAGE}" in docs and space.LIBRARY.endswith(space.PACKAGE)
