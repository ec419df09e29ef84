"""Compare NanoPhi with stock Phi by transformers' own tests: `make peer`.

    python tests/peer/run.py FOLDER

Downloads transformers' source distribution of the installed version into FOLDER once, runs its tests of models and
configurations on both, and fails if NanoPhi fails what Phi passes, except for `DEVIATIONS`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import transformers

DEVIATIONS: dict[str, str] = {
    "test_can_init_all_missing_weights": "skipped where a file has no copyright year of 2023 or later in its header",
}
"""Test that NanoPhi may fail -> why."""


def fetch(folder: Path) -> Path:
    """The unpacked source distribution."""
    source = folder / f"transformers-{transformers.__version__}"
    if not source.exists():
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        name = f"transformers=={transformers.__version__}"
        subprocess.run([*pip, "download", name, "--no-binary", ":all:", "--no-deps", "--dest", folder], check=True)
        subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", "parameterized==0.9.0"], check=True)
        shutil.unpack_archive(next(folder.glob("transformers-*.tar.gz")), folder)
        (source / "tests" / "__init__.py").touch()  # left out of the distribution
    return source


def outcomes(source: Path, site: Path) -> dict[str, dict[str, str]]:
    """Test -> outcome ("passed", "failed", "skipped"), of each class."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", "--tb=line"]
        command += ["--rootdir", folder, "-c", os.devnull, f"--junitxml={report}"]
        command.append(str(Path(__file__).with_name("suite.py")))
        path = os.pathsep.join([str(source), str(site), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        output = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
        if not report.exists():
            raise SystemExit(output.stdout[-3000:] + output.stderr[-3000:])
        found: dict[str, dict[str, str]] = {"TestPhi": {}, "TestNanoPhi": {}}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            if not case.get("classname"):
                raise SystemExit("".join(case.itertext())[-3000:])  # the suite could not be collected
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            found[str(case.get("classname")).rpartition(".")[2]][str(case.get("name"))] = outcome
            if outcome == "failed":
                text = next(str(child.get("message")) for child in case if child.tag in ("failure", "error"))
                print(f"{case.get('classname')}.{case.get('name')}: {' '.join(text.split())[:300]}")
    return found


def main() -> None:
    folder = Path(sys.argv[1]).resolve()  # the tests run in another folder
    folder.mkdir(parents=True, exist_ok=True)
    found = outcomes(fetch(folder), folder / "site")
    for name, tests in found.items():
        counts = {kind: list(tests.values()).count(kind) for kind in ("passed", "failed", "skipped")}
        print(f"{name}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    ours, theirs = found["TestNanoPhi"], found["TestPhi"]
    worse = [test for test, outcome in theirs.items() if outcome == "passed" and ours.get(test) != "passed"]
    for test in worse:
        print(f"NanoPhi {ours.get(test, 'lacks')} {test}: {DEVIATIONS.get(test, 'UNEXPLAINED')}")
    if unexplained := [test for test in worse if test not in DEVIATIONS]:
        raise SystemExit(f"NanoPhi is worse than Phi in {len(unexplained)} tests")
    if not any(outcome == "passed" for outcome in ours.values()):
        raise SystemExit("nothing passed: the tests did not run")
    print("NanoPhi passes what Phi passes" + (f", with {len(worse)} listed deviations" if worse else ""))


if __name__ == "__main__":
    main()
