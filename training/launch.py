"""`nanophi launch`: `nanophi run` on a rented machine, or in a fresh environment on this one, with a mirror.

It is beside `estimate`, whose prediction it shows before anything is paid. The job gets a wheel of the package as it is
installed here, the versions that are installed here, and the resolved recipes, all from the mirror. It ends itself
before its time is over, with everything saved; the same command then continues it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shlex
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from typer import Argument, Option

import nanophi
from nanophi.core import formatting
from nanophi.core.errors import UserError, printable, suggest, user_errors
from nanophi.core.mirror import connect, put
from nanophi.core.options import Mirror, Overrides
from nanophi.core.recipe import Recipe, load_recipe
from nanophi.training.budget import device_named
from nanophi.training.estimate import predict

if TYPE_CHECKING:
    from huggingface_hub import HfApi, JobHardwareInfo

DRIVERS = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}  # scheme of a mirror's URL -> package
LAST_MINUTES = 0.1, 600.0
"""Share of a job's time, and seconds at most, that are kept for saving and for the last copy."""
FETCH = "import fsspec; f, p = fsspec.url_to_fs({0!r}); [f.get_file(p + '/' + n, n) for n in {1!r}]"


def launch(
    recipes: Annotated[list[Path], Argument(metavar="RECIPE...", help="YAML files, or built-in recipes.")] = [],
    on: Annotated[Literal["hf", "local"], Option(help="Hugging Face Jobs, or a fresh environment here.")] = "hf",
    flavor: Annotated[str, Option(help="Hardware of the Hub's list.")] = "h200",
    max_dollars: Annotated[float | None, Option(min=0.01, help="End the job before it costs more.")] = None,
    max_hours: Annotated[float, Option(min=0.001, help="End the job before it takes longer.")] = 24.0,
    mirror: Mirror = None,
    image: Annotated[str, Option(help="Docker image.")] = f"python:{sys.version_info[0]}.{sys.version_info[1]}",
    secret: Annotated[list[str], Option(metavar="NAME", help="Pass on a variable; repeatable.")] = [],
    yes: Annotated[bool, Option("--yes", help="Do not ask.")] = False,
    follow: Annotated[str | None, Option(metavar="ID", help="Follow a job that was launched before.")] = None,
    overrides: Overrides = [],
) -> None:
    """Run recipes on a rented GPU, within a budget.

    The plan is shown first. Run it again to continue after the time is over.

    Example: nanophi launch nano-phi-115m --flavor h200 --max-dollars 15 --mirror hf://buckets/ORG/runs
    """
    from huggingface_hub import HfApi, get_token

    hidden = {"HF_TOKEN": get_token() or ""} | {name: os.environ.get(name, "") for name in secret}
    if follow:
        return _follow(HfApi(), follow, hidden)
    if not recipes or mirror is None or (on == "hf" and max_dollars is None):
        raise UserError("name at least a RECIPE and --mirror, and with --on hf --max-dollars too")
    resolved = [load_recipe(recipe, overrides) for recipe in recipes]
    for recipe in resolved:
        if files := [source.files for source in (*recipe.data.sources, *recipe.conversations) if source.files]:
            raise UserError(f"{recipe.name}: the job cannot read {files[0]}; put it on the Hub, and name it with `hub`")
    files, path = connect(mirror)
    url = mirror if "://" in mirror else path
    machine = _hardware(HfApi(), flavor) if on == "hf" else None
    price = _dollars_per_hour(machine) if machine else 0.0
    hours = min(max_hours, max_dollars / price if price and max_dollars else max_hours)
    with tempfile.TemporaryDirectory(prefix="nanophi-launch-") as scratch:
        kit = _kit(Path(scratch), resolved)
        content = b"".join(part for name in kit for part in (name.encode(), kit[name].read_bytes()))
        place = f"launch/{hashlib.sha256(content).hexdigest()[:12]}"
        count = int(machine.accelerator.quantity) if machine and machine.accelerator else 1
        script = _script(f"{url}/{place}", list(kit), resolved, min(count, len(resolved)), 3600 * hours, url)
        typer.echo(_plan(resolved, machine, image, price, hours, script, hidden if on == "hf" else {}))
        if not yes and not typer.confirm("Submit it?"):
            raise UserError("nothing was submitted")
        with user_errors(f"--mirror {mirror} cannot be written"):
            put(files, f"{path}/{place}", kit)
    if machine is None:
        return _run_here(script)
    with user_errors("the job was not submitted"):
        job = HfApi().run_job(
            image=image,
            command=["bash", "-c", script],
            flavor=flavor,
            timeout=int(3600 * hours),
            secrets={name: value for name, value in hidden.items() if value},
        )
    typer.echo(f"job {job.id}: {job.url}")
    _follow(HfApi(), job.id, hidden)


def _hardware(api: HfApi, flavor: str) -> JobHardwareInfo:
    with user_errors("the Hub's list of hardware cannot be read"):
        known = {one.name: one for one in api.list_jobs_hardware()}
    if flavor not in known:
        raise UserError(f"--flavor {flavor} is unknown; {suggest(flavor, known, most=2)}")
    return known[flavor]


def _dollars_per_hour(machine: JobHardwareInfo) -> float:
    return machine.unit_cost_usd * {"minute": 60, "hour": 1, "second": 3600}[machine.unit_label]


def wheel(folder: Path) -> Path:
    """Write a wheel of the package as it is installed here, the same bytes each time."""
    root, known = Path(nanophi.__file__).parent, importlib.metadata.distribution("nanophi")
    rooms = sorted(room.parent for room in root.glob("*/__init__.py"))
    found = [
        *sorted(root.glob("*.py")),
        root / "LICENSE",
        *(file for room in rooms for file in sorted(room.rglob("*"))),
    ]
    files = {f"nanophi/{file.relative_to(root).as_posix()}": file.read_bytes() for file in found if file.is_file()}
    files = {name: content for name, content in files.items() if "__pycache__" not in name}
    info = f"nanophi-{nanophi.__version__}.dist-info"
    files[f"{info}/METADATA"] = (known.read_text("METADATA") or "").encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: nanophi\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD")).encode()
    path = folder / f"nanophi-{nanophi.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return path


def _kit(folder: Path, recipes: Sequence[Recipe]) -> dict[str, Path]:
    """What a job needs, by its name: the wheel, the versions that are installed here, the resolved recipes."""
    built = wheel(folder)
    versions = {one.name: one.version.partition("+")[0] for one in importlib.metadata.distributions()}
    versions.pop("nanophi", None)
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))
    (folder / "constraints.txt").write_text(lines, encoding="utf-8")
    for recipe in recipes:
        text = yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True)
        (folder / f"{recipe.name}.yaml").write_text(text, encoding="utf-8")
    return {name: folder / name for name in (built.name, "constraints.txt", *(f"{one.name}.yaml" for one in recipes))}


def _script(kit: str, names: list[str], recipes: Sequence[Recipe], jobs: int, seconds: float, url: str) -> str:
    """What the job runs; bash counts the seconds from its beginning."""
    driver = DRIVERS.get(url.partition(":")[0], "")
    share, most = LAST_MINUTES
    command = ["nanophi", "run", *(f"./{one.name}.yaml" for one in recipes), "--jobs", str(jobs), "--mirror", url]
    install = "python -m pip install --quiet --disable-pip-version-check"
    return "\n".join(
        [
            "set -e",
            f"{install} fsspec {driver}".rstrip(),
            f"python -c {shlex.quote(FETCH.format(kit, names))}",
            f"{install} --ignore-installed --no-deps ./{names[0]}",
            f"{install} --constraint constraints.txt ./{names[0]} {driver}".rstrip(),
            f"exec timeout --signal=TERM $(({int(seconds - min(share * seconds, most))} - SECONDS)) "
            f"python -m {shlex.join(command)}",
        ]
    )


def _plan(
    recipes: Sequence[Recipe],
    machine: JobHardwareInfo | None,
    image: str,
    price: float,
    hours: float,
    script: str,
    secrets: Sequence[str],
) -> str:
    """What would be run, what it takes and when it ends, as text."""
    lines = [f"command:  {script.rpartition('python -m ')[2]}"]
    if machine:
        lines = [
            f"image:    {image}",
            f"flavor:   {machine.name} ({machine.pretty_name}), ${price:.2f} an hour",
            *lines,
        ]
        lines.append(f"secrets:  {', '.join(secrets)}")
        device = device_named(machine.accelerator.model) if machine.accelerator else None
        trained = [recipe for recipe in recipes if not recipe.conversations]
        if device and trained:
            known = [predict(recipe, device, dollars_per_hour=price) for recipe in trained]
            total, speed = sum(one["hours"] for one in known), formatting.percent(known[0]["mfu"], 0)
            lines.append(
                f"estimate: {formatting.duration(3600 * total)} and ${total * price:.2f} for the training (MFU {speed})"
            )
    cost = f" and ${hours * price:.2f}" if price else ""
    lines.append(f"limit:    {formatting.duration(3600 * hours)}{cost}; everything is saved before, to be continued")
    return "\n".join(lines)


def _follow(api: HfApi, job_id: str, hidden: dict[str, str]) -> None:
    """Print a job's log to its end. Raises `UserError` if that is not a good one."""
    try:
        with user_errors(f"job {job_id} cannot be followed"):
            for line in api.fetch_job_logs(job_id=job_id, follow=True):
                for value in filter(None, hidden.values()):
                    line = line.replace(value, "***")
                typer.echo(printable(line.rstrip("\n")))
            status = api.inspect_job(job_id=job_id).status
    except KeyboardInterrupt:
        typer.echo(f"\nthe job goes on; nanophi launch --follow {job_id}")
        return
    if status.stage != "COMPLETED":
        why = f" ({printable(status.message)})" if status.message else ""
        raise UserError(f"job {job_id} ended with {status.stage}{why}; launch it again to continue from the mirror")


def _run_here(script: str) -> None:
    """Run a job's script in a fresh environment, which sees the packages of this one, and in an empty folder."""
    with tempfile.TemporaryDirectory(prefix="nanophi-job-") as scratch:
        folder, packages = Path(scratch), f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        venv.create(folder / "env")
        (folder / "env" / packages / "here.pth").write_text("\n".join(path for path in sys.path if "-packages" in path))
        (folder / "job").mkdir()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["PATH"] = f"{folder / 'env/bin'}{os.pathsep}{environment['PATH']}"
        code = subprocess.run(["bash", "-c", script], cwd=folder / "job", env=environment).returncode
    if code:
        why = "its time is over" if code == 124 else f"exit status {code}"
        raise UserError(f"the job ended early ({why}); launch it again to continue from the mirror")
