"""`nanophi launch`: `nanophi run` on a rented machine, or in a fresh environment on this one, with a mirror.

It is beside `estimate`, whose prediction it shows before anything is paid. The job gets a wheel of the package as it is
installed here, the versions that are installed here, and the resolved recipes, all from the mirror. It ends itself
before its time is over, with everything saved; the same command then continues it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from packaging.utils import canonicalize_name
from typer import Argument, Option

import nanophi
from nanophi.core import formatting
from nanophi.core.errors import UserError, printable, suggest, user_errors
from nanophi.core.files import write_text
from nanophi.core.jobs import end_like_ctrl_c
from nanophi.core.mirror import connect, put
from nanophi.core.names import local
from nanophi.core.options import Mirror, Overrides
from nanophi.core.recipe import Recipe, check_distinct, load_recipe
from nanophi.core.recipe_file import dump
from nanophi.training.budget import device_named
from nanophi.training.estimate import predict

if TYPE_CHECKING:
    from huggingface_hub import HfApi, JobHardwareInfo

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
DRIVERS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
"""Scheme of a mirror's URL -> the package that reads it."""
LEAST_SECONDS = 600.0  # of a rented job: to install takes minutes
LAST_SHARE, LAST_SECONDS = 0.1, 600.0  # of a job's time, at most, that are kept for saving and the last copy
HOURS = {"second": 1 / 3600, "minute": 1 / 60, "hour": 1.0}
INSTALL = "python -m pip install --quiet --disable-pip-version-check"
FETCH = "import fsspec; f, p = fsspec.url_to_fs({0!r}); [f.get_file(p + '/' + n, n) for n in {1!r}]"


def launch(
    recipes: Annotated[list[Path], Argument(metavar="RECIPE...", help="YAML files, or built-in recipes.")] = [],
    on: Annotated[Literal["hf", "local"], Option(help="Hugging Face Jobs, or a fresh environment here.")] = "hf",
    flavor: Annotated[str, Option(help="Hardware, of the Hub's list.")] = "h200",
    max_dollars: Annotated[float | None, Option(min=0.01, help="End the job before it costs more.")] = None,
    max_hours: Annotated[float, Option(min=0.001, help="End the job before it takes longer.")] = 24.0,
    mirror: Mirror = None,
    image: Annotated[str, Option(help="Docker image.")] = f"python:{PYTHON}",
    secret: Annotated[list[str], Option(metavar="NAME", help="Pass this variable on; repeatable.")] = [],
    yes: Annotated[bool, Option("--yes", help="Do not ask.")] = False,
    follow: Annotated[str | None, Option(metavar="ID", help="Follow a job that was launched before.")] = None,
    overrides: Overrides = [],
) -> None:
    """Run recipes on a rented GPU, within a budget. The same command continues them when their time was over.

    Example: nanophi launch nano-phi-115m --flavor h200 --max-dollars 15 --mirror hf://buckets/ORG/runs
    """
    from huggingface_hub import HfApi, get_token

    if unset := [name for name in secret if not os.environ.get(name)]:
        raise UserError(f"--secret {unset[0]}: there is no such variable; set it, or leave it out")
    api, known = HfApi(), {"HF_TOKEN": get_token(), **{name: os.environ[name] for name in secret}}
    secrets = {name: value for name, value in known.items() if value}
    if follow:
        return _follow(api, follow, secrets)
    far = mirror is not None and "://" in mirror and not mirror.startswith("file:")
    if not recipes or mirror is None or (on == "hf" and (max_dollars is None or not far)):
        raise UserError(
            "name a RECIPE and --mirror; with --on hf the URL of one that the job reaches, and --max-dollars"
        )
    resolved, (files, path) = [load_recipe(recipe, overrides) for recipe in recipes], connect(mirror)
    check_distinct(resolved)
    for recipe in resolved:
        if mine := _local_names(recipe):
            raise UserError(f"{recipe.name}: the job cannot read {mine[0]}; put it on the Hub, and name it there")
    machine = _hardware(api, flavor) if on == "hf" else None
    price = machine.unit_cost_usd / HOURS[machine.unit_label] if machine else 0.0
    hours = min(max_hours, max_dollars / price) if price and max_dollars else max_hours
    if machine and 3600 * hours < LEAST_SECONDS:
        limit, least = formatting.duration(3600 * hours), formatting.duration(LEAST_SECONDS)
        raise UserError(f"{limit} of {flavor}, at ${price:.2f} an hour, are too short; allow at least {least}")
    url = mirror if "://" in mirror else path
    with tempfile.TemporaryDirectory(prefix="nanophi-launch-") as scratch:
        kit = _kit(Path(scratch), resolved)
        place = "launch/" + hashlib.sha256(b"".join(file.read_bytes() for file in kit.values())).hexdigest()[:12]
        count = int(machine.accelerator.quantity) if machine and machine.accelerator else 1
        command = ["nanophi", "run", *(f"./{one.name}.yaml" for one in resolved), "--mirror", url]
        command += ["--jobs", str(min(count, len(resolved)))] if count > 1 else []
        script = _script(f"{url}/{place}", list(kit), _extras(resolved), shlex.join(command), 3600 * hours)
        if machine:
            typer.echo(f"image:    {image}\nsecrets:  {', '.join(secrets)}")
            typer.echo(f"flavor:   {machine.name} ({machine.pretty_name}), ${price:.2f} an hour")
            typer.echo(_estimate(resolved, machine, price))
        cost = f" and ${hours * price:.2f}" if machine else ""
        typer.echo(
            f"command:  {shlex.join(command)}\nlimit:    {formatting.duration(3600 * hours)}{cost}, then resumable"
        )
        if not yes and not (sys.stdin.isatty() and typer.confirm("Submit it?")):
            raise UserError("nothing was submitted; answer yes, or add --yes")
        with user_errors(f"--mirror {mirror} cannot be written"):
            put(files, f"{path}/{place}", kit)
    if machine is None:
        return _run_here(script)
    bash, seconds = ["bash", "-c", script], int(3600 * hours)
    with user_errors("the job was not submitted"):
        job = api.run_job(image=image, command=bash, flavor=flavor, timeout=seconds, secrets=secrets)
    typer.echo(f"job:      {job.id}, {job.url}")
    _follow(api, job.id, secrets)


def _hardware(api: HfApi, flavor: str) -> JobHardwareInfo:
    with user_errors("the Hub's list of hardware cannot be read"):
        known = {machine.name: machine for machine in api.list_jobs_hardware()}
    if flavor not in known:
        raise UserError(f"--flavor {flavor} is unknown; {suggest(flavor, known, most=2)}")
    return known[flavor]


def _estimate(recipes: Sequence[Recipe], machine: JobHardwareInfo, price: float) -> str:
    """Time and dollars of the trainings, where they can be predicted."""
    device = device_named(machine.accelerator.model) if machine.accelerator else None
    if device is None or any(recipe.conversations for recipe in recipes):
        return "estimate: unknown for this machine or recipe"
    known = [predict(recipe, device) for recipe in recipes]
    hours, mfu = sum(one["hours"] for one in known), formatting.percent(known[0]["mfu"], 0)
    return (
        f"estimate: {formatting.duration(3600 * hours)} and ${hours * price:.2f} for the training, at {mfu} of the peak"
    )


def wheel(folder: Path) -> Path:
    """Write a wheel of the package as it is installed here; the same package gives the same bytes."""
    root, info = Path(nanophi.__file__).parent, f"nanophi-{nanophi.__version__}.dist-info"
    rooms = [room.parent for room in root.glob("*/__init__.py")]
    # As `package-data` of pyproject.toml: a clone's folders may hold the user's own files.
    kinds = {".py", ".yaml", ".json", ".md", ".html", ".css"}
    rooms_files = (file for room in rooms for file in room.rglob("*") if file.suffix in kinds and file.name[0] != ".")
    found = sorted(file for file in (*root.glob("*.py"), root / "LICENSE", *rooms_files) if file.is_file())
    files = {f"nanophi/{file.relative_to(root).as_posix()}": file.read_bytes() for file in found}
    files[f"{info}/METADATA"] = str(importlib.metadata.distribution("nanophi").read_text("METADATA")).encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: nanophi\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD")).encode()
    path = folder / f"nanophi-{nanophi.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return path


def _kit(folder: Path, recipes: Iterable[Recipe]) -> dict[str, Path]:
    """What a job needs, by its name: the wheel first, the versions that are installed here, the resolved recipes."""
    versions: dict[str, str] = {}
    for one in importlib.metadata.distributions():  # the first of a name is what is imported; what pip left has none
        name, version = one.metadata["Name"], one.metadata["Version"]
        if name and version and canonicalize_name(name) not in ("nanophi", *versions):
            versions[canonicalize_name(name)] = version.partition("+")[0]
    texts = {"constraints.txt": "\n".join(sorted(f"{name}=={version}" for name, version in versions.items()))}
    for recipe in recipes:
        texts[f"{recipe.name}.yaml"] = dump(recipe.dump())
    for name, text in texts.items():
        write_text(folder / name, text)
    return {file.name: file for file in (wheel(folder), *(folder / name for name in texts))}


def _local_names(recipe: Recipe) -> list[str]:
    """What a recipe names that is on this machine alone."""
    sources, scorer = [*recipe.data.sources, *recipe.conversations], recipe.quality.scorer
    folders = (recipe.data.decontamination.benchmarks, recipe.evaluation.data, *(source.files for source in sources))
    hub = [recipe.base, recipe.tokenizer.path, *(source.hub for source in sources)]
    hub += [scorer.partition(":")[2]] * scorer.startswith("model:")
    return [name for name in folders if name] + [name for name in hub if name and local(name).exists()]


def _extras(recipes: Iterable[Recipe]) -> tuple[str, list[str]]:
    """What recipes need beside the package's own dependencies: its extras as `[a,b]`, and other packages."""
    extras, others = set[str](), set[str]()
    for recipe in recipes:
        wanted = {"chat": recipe.conversations, "energy": recipe.training.track_energy}
        wanted["cluster"] = recipe.data.engine != "local"
        extras |= {name for name, needed in wanted.items() if needed}
        others |= {*recipe.training.report_to}
    return f"[{','.join(sorted(extras))}]" if extras else "", sorted(others)


def _script(kit: str, names: Sequence[str], extras: tuple[str, list[str]], command: str, seconds: float) -> str:
    """What the job runs; bash counts the seconds from its beginning."""
    driver = DRIVERS.get(kit.partition(":")[0], "")
    packages = shlex.join([f"./{names[0]}{extras[0]}", *extras[1], *driver.split()])
    until = int(seconds - min(LAST_SHARE * seconds, LAST_SECONDS))
    return f"""set -e
{INSTALL} fsspec {driver}
python -c {shlex.quote(FETCH.format(kit, list(names)))}
{INSTALL} --ignore-installed --no-deps ./{names[0]}
{INSTALL} --constraint constraints.txt {packages}
left=$(({until} - SECONDS))
exec timeout --foreground --signal=TERM $((left > 1 ? left : 1)) python -m {command}"""


def _follow(api: HfApi, job_id: str, secrets: dict[str, str]) -> None:
    """Print a job's log until it ends. Raises `UserError` if that is not a good end."""
    hidden = {part for value in secrets.values() for part in value.splitlines() if part.strip()}
    try:
        with user_errors(f"job {job_id} cannot be followed"):
            for line in api.fetch_job_logs(job_id=job_id, follow=True):
                for value in sorted(hidden, key=len, reverse=True):
                    line = line.replace(value, "***")
                typer.echo(printable(line.rstrip("\n")))
            stage = api.inspect_job(job_id=job_id).status.stage
    except KeyboardInterrupt:
        typer.echo(f"\nthe job continues; to follow it again: nanophi launch --follow {job_id}")
        return
    if stage != "COMPLETED":
        raise UserError(f"job {job_id} ended early ({stage}); launch it again to continue from the mirror")


def _run_here(script: str) -> None:
    """Run a job's script in a fresh environment, which sees the libraries of this one, and in an empty folder."""
    with tempfile.TemporaryDirectory(prefix="nanophi-job-") as scratch:
        job, here = Path(scratch, "job"), [path for path in sys.path if path.endswith("-packages")]
        job.mkdir()
        venv.create(Path(scratch, "env"))
        Path(scratch, f"env/lib/python{PYTHON}/site-packages/here.pth").write_text("\n".join(here))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["PATH"] = f"{scratch}/env/bin{os.pathsep}{environment['PATH']}"
        # A signal from the terminal reaches this process alone, which passes on one, and waits while the job saves.
        end_like_ctrl_c(signal.SIGTERM)
        process = subprocess.Popen(["bash", "-c", script], cwd=job, env=environment, start_new_session=True)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what a job that could not save has left
    if code:
        why = "its time is over" if code == 124 else f"exit status {code}"
        raise UserError(f"the job ended early ({why}); launch it again to continue from the mirror")
