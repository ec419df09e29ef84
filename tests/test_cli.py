"""The command: help for every verb, and one clear line with a non-zero status for every mistake."""

import errno
import re
import shlex
import subprocess
import sys

import pytest
import typer
from command import nanophi

from nanophi import __version__, cli, pipeline
from nanophi.cli import INTERRUPTED, main
from nanophi.core import errors

VERBS = [[name] for name, verb in cli.VERBS.items() if isinstance(verb, str)]
VERBS += [[group, name] for group, verbs in cli.VERBS.items() if isinstance(verbs, dict) for name in verbs]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_help_with_an_example(capsys, verb):
    assert nanophi(*verb, "--help") == 0
    assert "Example: " in capsys.readouterr().out


def parse(arguments: list[str]) -> dict[str, object]:
    """What the real parser makes of a command line. Raises typer's own errors."""
    command, context = typer.main.get_command(cli.app), None
    while True:
        context = command.make_context(arguments[0] if context else "nanophi", list(arguments), parent=context)
        if not hasattr(command, "resolve_command"):
            return context.params
        _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])


def examples() -> list[str]:
    """Every command line that the help gives as an example, whatever starts it."""
    group = typer.main.get_command(cli.app)
    texts = []
    for verb in VERBS:
        command = group
        for name in verb:
            command = command.get_command(None, name)
        texts.append(command.callback.__doc__)
    return [line.strip() for text in texts for line in text.splitlines() if re.search(r": .*\bnanophi ", line)]


@pytest.mark.parametrize("example", examples())
def test_every_example_is_a_command_that_parses(example):
    line = shlex.split(example.partition(": ")[2])
    arguments = line[line.index("nanophi") + 1 :]
    assert parse(arguments)
    with pytest.raises(Exception, match="No such option"):
        parse([*arguments, "--no-such-option"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nanophi: recipe nowhere.yaml does not exist; built-in recipes: demo, "),
        (["run", "demo", "--set", "training.stepz=1"], "'training': unknown key 'stepz'; did you mean 'steps'?"),
        (["run", "demo", "demo"], "two recipes have the same name (demo, demo); each run needs its own directory"),
        (["run", "demo", "--set", "evaluation.suites=[heldoot]"], "heldout"),
        (["train", "demo"], "runs/demo does not exist; run `nanophi prepare`"),
        (["compare", "."], "holds no results; name a run directory"),
        (["eval", "no_such_folder"], "folder no_such_folder does not exist, and it is not a Hub id"),
        (["generate", "nowhere", "x"], "folder nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = nanophi(*arguments)  # a message: the interpreter prints it to stderr and exits with 1
    assert code.startswith("nanophi: ") and message in code and "\n" not in code
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.glob("runs/*/data"))


def test_a_full_disk_is_one_line(monkeypatch, tmp_path):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("nanophi.core.stages.write_text", full)
    assert nanophi("run", "demo", "--runs", tmp_path).startswith("nanophi: no disk space left")


def test_a_quick_answer_loads_none_of_the_large_libraries(tmp_path):
    """Help, a mistyped verb, a mistyped recipe or key: answered without the seconds that torch takes to import."""
    script = """
import contextlib, io, sys
from nanophi.cli import main
helps = "--help", "run --help", "quality report --help"
for line in (*helps, "rnu", "run nowhere", "train demo --set training.stepz=1"):
    sys.argv[1:] = line.split()
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())), contextlib.suppress(SystemExit):
        main()
print(*sorted({"torch", "transformers", "datasets", "lm_eval", "numpy", "pyarrow", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_ctrl_c_is_one_line_and_the_version_another(monkeypatch, capsys, tmp_path):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_recipes", interrupted)
    assert nanophi("run", "demo", "--runs", tmp_path) == INTERRUPTED
    assert capsys.readouterr() == ("", "\nnanophi: interrupted; run the same command to resume\n")
    assert nanophi("--version") == 0 and capsys.readouterr().out == f"nanophi {__version__}\n"


def test_debug_shows_where_it_came_from(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nanophi", "run", "nowhere.yaml", "--debug"])
    with pytest.raises(errors.UserError):
        main()


def test_the_root_is_imported_once():
    """The package's root is the repository's: pytest must not import it again under the checkout's name."""
    import nanophi.configuration_nanophi

    file = nanophi.configuration_nanophi.__file__
    twins = [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == file]
    assert twins == ["nanophi.configuration_nanophi"]
