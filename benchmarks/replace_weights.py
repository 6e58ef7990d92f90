"""Replace the weights of picture-world: ``python -m benchmarks.replace_weights install MODEL``, and then ``run``.

``install`` copies a trained model, or its judge, to data/picture-world. ``run`` repeats the commands whose results
depend on the weights and are stored in the repository. A finished task is not repeated while the weights are the same,
so that the same call resumes an interrupted one. docs/developing/replacing-the-weights.md lists what must be updated by
hand: prose, constants, and labels by eye.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from tqdm.auto import tqdm

from elakit.cli_options import one_line_errors, without_markup
from elakit.errors import SettingError
from elakit.files import replace_folder, write_file

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "data" / "picture-world"
PARTS = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
JUDGE = "judge"

app = typer.Typer(help=without_markup(__doc__), no_args_is_help=True)


@dataclass(frozen=True)
class Task:
    """Commands that produce one result.

    Attributes
    ----------
    name : str
    what : str
        Description of the result, which the command ``list`` prints.
    commands : tuple of str
        Commands that run one after another in the root of the repository. ``{work}`` stands for the working folder;
        ``python`` and ``elakit`` are those of the running interpreter.
    hours : bool
        True if the task takes hours; it then runs only if it is named.
    """

    name: str
    what: str
    commands: tuple[str, ...]
    hours: bool = False


def tasks() -> list[Task]:
    """All tasks in the order in which they run; the predictor is first, because notebooks use it.

    Examples
    --------
    >>> tasks()[0].name
    'predictor'
    """
    notebooks = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    return [
        Task(
            "predictor", "predictor of failures",
            (
                "elakit sweep run --suite attend-and-excite --limit 138 --seeds 0,2,4,6 --methods plain "
                "--out {work}/predictor",
                "elakit predict fit {work}/predictor --out data/picture-world/predictor.json",
            ),
        ),
        Task(
            "sheet", "contact sheet of the model card",
            ("python -m benchmarks.picture_world sheet --out data/picture-world/contact_sheet.png",),
        ),
        Task("gallery", "images of the gallery, README and evidence page", ("python -m benchmarks.gallery",)),
        Task("explorer", "images of the explorer", ("python -m benchmarks.explorer --images docs",)),
        Task("live", "images of the live panel", ("python -m benchmarks.live docs",)),
        *(Task(name, "notebook", (f"python notebooks/run.py {name}",)) for name in notebooks),
        Task("card", "table of the model card, in the log", ("python -m benchmarks.picture_world all",)),
        Task(
            "causes", "tables of docs/causes.md, in the log",
            ("python -m benchmarks.causes draw", "python -m benchmarks.causes report"), hours=True,
        ),
        Task(
            "comparison", "comparison of the methods in docs/evidence.md",
            (
                "elakit sweep run --suite attend-and-excite --seeds 1,3,5,7 --out {work}/test --methods "
                "plain,ela,regional-attention,attend-and-excite,syngen,divide-and-bind,a-star,ebama,conform,self-cross",
                "elakit sweep report {work}/test",
            ),
            hours=True,
        ),
    ]  # fmt: skip


@app.command()
def install(
    model: Annotated[Path, typer.Argument(help="Folder that a training wrote, such as work/picture-world/model.")],
    judge: Annotated[bool, typer.Option("--judge", help="Copy the judge instead of the model.")] = False,
    target: Annotated[Path, typer.Option("--to", help="Folder of the model that is replaced.")] = SHIPPED,
) -> None:
    """Copy a trained model, or its judge, to data/picture-world."""
    parts = (JUDGE,) if judge else PARTS
    if missing := [part for part in parts if not (model / part).exists()]:
        raise SettingError(f"{model} has no {', '.join(missing)}. Name the folder of a finished training.")
    target.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if (model / part).is_dir():
            with replace_folder(target / part) as new:
                shutil.copytree(model / part, new, dirs_exist_ok=True)
        else:
            write_file(target / part, (model / part).read_bytes())
    print(f"Replaced {', '.join(parts)} in {target}. Next: python -m benchmarks.replace_weights run")


@app.command("list")
def list_tasks() -> None:
    """List the tasks of `run` and their commands; those that take hours run only if they are named."""
    for task in tasks():
        print(f"{task.name}: {task.what}{' (hours)' if task.hours else ''}")
        for command in task.commands:
            print(f"    {command}")


@app.command()
def run(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names of tasks. Default: all except those that take hours.")
    ] = None,
    work: Annotated[
        Path, typer.Option("--work", help="Folder for logs, sweeps and the record of finished commands.")
    ] = Path("work/replace-weights"),
    processes: Annotated[int, typer.Option(min=1, help="Tasks that run at the same time, with one thread each.")] = 1,
    again: Annotated[bool, typer.Option("--again", help="Repeat finished tasks, too.")] = False,
) -> None:
    """Run the tasks that have not finished with the present weights; their output is in the logs of the work folder.

    A task that fails does not end the others; the exit status is then 1.
    """
    every = {task.name: task for task in tasks()}
    if unknown := set(names or ()) - set(every):
        raise SettingError(f"Unknown task {', '.join(map(repr, sorted(unknown)))}. Choose from {', '.join(every)}.")
    weights = fingerprint(SHIPPED)
    chosen = [task for task in every.values() if (task.name in names if names else not task.hours)]
    waiting = [task for task in chosen if again or not is_done(work, task.name, weights)]
    work.mkdir(parents=True, exist_ok=True)
    failed = []
    with tqdm(total=len(waiting), unit="task") as bar, ThreadPoolExecutor(processes) as pool:

        def one(task: Task) -> None:
            if not perform(task, work, weights, processes):
                failed.append(task.name)
                tqdm.write(f"{task.name} failed: see {work / task.name}.log")
            bar.update()

        if waiting and waiting[0].name == "predictor":  # notebooks use it
            one(waiting.pop(0))
        list(pool.map(one, waiting))
    if failed:
        raise typer.Exit(1)


def perform(task: Task, work: Path, weights: str, processes: int = 1) -> bool:
    """Run the commands of a task, write their output to its log, and note that they succeeded; False if one failed."""
    threads = {"OMP_NUM_THREADS": "1"} if processes > 1 else {}
    # programs beside the interpreter come first, such as elakit
    environment = os.environ | threads | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with (work / f"{task.name}.log").open("w", encoding="utf-8") as log:
        for command in task.commands:
            words = arguments(command, work)
            print(f"$ {shlex.join(words)}", file=log, flush=True)
            ended = subprocess.run(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            if ended.returncode:
                return False
    write_file(work / f"{task.name}.done", weights.encode())
    return True


def arguments(command: str, work: Path) -> Sequence[str]:
    """Words of a command, with the working folder and the running interpreter."""
    words = [word.replace("{work}", str(work.resolve())) for word in shlex.split(command)]
    return [sys.executable if word == "python" else word for word in words]


def fingerprint(folder: Path) -> str:
    """SHA-256 of all weights in a model's folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_done(work: Path, name: str, weights: str) -> bool:
    """True if a task has finished with these weights."""
    done = work / f"{name}.done"
    return done.is_file() and done.read_text(encoding="utf-8") == weights


if __name__ == "__main__":
    with one_line_errors("benchmarks.replace_weights"):
        app()
