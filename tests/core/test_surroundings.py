"""A process in a place that is not the makers': streams, home, caches, TMPDIR, limits."""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

RAN = "from nanophi.core import surroundings; surroundings.settle(); "
STRANGER = "import os, getpass, pwd; from nanophi.core import surroundings; os.setuid(54321); surroundings.settle(); "


def run(code: str, start: str = RAN, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, **options.pop("env", {})}
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", start + code], env=environment, capture_output=True, text=True, **options
    )


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_stop_nothing_and_their_numbers_go_to_no_file(tmp_path, closed):
    code = f"print('x'); open({str(tmp_path / 'f')!r}, 'w').write('data'); print('y')"
    done = run(code, preexec_fn=lambda: [os.close(number) for number in closed])
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert (tmp_path / "f").read_text() == "data"


def test_a_reader_that_goes_away_stops_nothing(tmp_path):
    read, write = os.pipe()
    code = f"import sys\nfor n in range(9000): print('line', n, flush=True)\nopen({str(tmp_path / 'f')!r}, 'w').close()"
    with subprocess.Popen([sys.executable, "-c", RAN + "\n" + code], stdout=write, stderr=subprocess.PIPE) as process:
        os.close(write)
        os.read(read, 10)
        os.close(read)
        assert process.stderr.read() == b""
    assert process.returncode == 0 and (tmp_path / "f").exists()


def test_lines_reach_a_pipe_or_a_file_as_they_are_printed():
    assert run("import os; print('step 1'); os._exit(0)").stdout == "step 1\n"


def test_empty_counts_of_a_launcher_are_no_counts():
    code = "from nanophi.core.stages import is_main_process; assert is_main_process()"
    assert run(code, env={"RANK": " "}).returncode == 0


@pytest.mark.parametrize(
    ("set_up", "line"),
    [
        ("os.environ['RANK'] = 'abc'", "the environment variable RANK is 'abc', which is not a whole number; unset it"),
        ("os.environ['LOCAL_WORLD_SIZE'] = '2.5'", "the environment variable LOCAL_WORLD_SIZE is '2.5', which is not"),
        ("tempfile._candidate_tempdir_list = lambda: []", "no temporary folder can be written; set TMPDIR to one"),
    ],
)
def test_what_cannot_be_worked_around_is_one_line(set_up, line):
    start = f"import os, sys, tempfile; {set_up}; sys.argv[1:] = ['--version']; "
    done = run("from nanophi.cli import main; main()", start)
    assert done.returncode == 1 and done.stderr.startswith(f"nanophi: {line}") and done.stderr.count("\n") == 1


def test_the_rank_of_no_process_and_lists_of_threads_are_the_libraries_own():
    assert run("", env={"LOCAL_RANK": "-1", "OMP_NUM_THREADS": "4,2"}).returncode == 0


def test_a_long_tmpdir_has_a_short_name_that_leads_to_it_and_is_removed(tmp_path):
    long = tmp_path / ("scratch/" * 12)
    long.mkdir(parents=True)
    code = "import tempfile; print(tempfile.gettempdir()); print(tempfile.mkdtemp())"
    short, made = run(code, env={"TMPDIR": str(long)}).stdout.split()
    assert len(short) < 40 and not Path(short).exists()
    assert (long / Path(made).name).is_dir()


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user's rights")
@pytest.mark.parametrize(
    ("home", "taken"),
    [(None, False), (None, True), *((home, False) for home in ("/", "/nonexistent", "TMP/closed", "TMP/closed/in"))],
)
def test_without_a_home_caches_have_another_place_that_nobody_else_made(home, taken):
    code = "getpass.getuser(); print(os.environ['HF_HOME']); os.makedirs(os.environ['HF_HOME'])\n"
    code += "import pathlib; (pathlib.Path.home() / '.settings').exists()"
    unset = dict.fromkeys(("HF_HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        (Path(folder) / "closed/in").mkdir(parents=True)
        (Path(folder) / "closed").chmod(0o700)
        home = home and home.replace("TMP", folder)
        if taken:
            (Path(folder) / "nanophi-54321").mkdir()
        done = run(code, env={**unset, "HOME": home, "TMPDIR": folder}, start=STRANGER, cwd="/")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(folder) and ("nanophi-54321/" in done.stdout) != taken


def test_every_shard_can_be_open_at_once():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = (min(256, hard), hard)
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    done = run(code, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit))
    assert int(done.stdout) > 256 or int(done.stdout) == hard
