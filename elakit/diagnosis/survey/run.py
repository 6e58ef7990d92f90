"""Diagnose many prompts, and go on where an earlier call was ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from elakit.diagnosis.survey.cases import cases, draw
from elakit.diagnosis.survey.summary import write
from elakit.errors import OutputError
from elakit.sweep import sweep as sweeps


@dataclass(frozen=True)
class Survey:
    """What a call of `diagnose_many` did.

    Attributes
    ----------
    page : Path
        The summary.
    there : int
        Prompts that were finished before.
    done : int
        Prompts that it finished.
    failed : dict of str to str
        Prompts that failed, with their errors; they are tried again by the next call.
    """

    page: Path
    there: int
    done: int
    failed: dict[str, str] = field(default_factory=dict)


def diagnose_many(
    prompts: Iterable[str],
    out: str | Path,
    *,
    seeds: int | Sequence[int] = 4,
    method: str = "ela",
    remedies: bool | Sequence[str] = True,
    model: str = "picture-world",
    steps: int | None = None,
    guidance_scale: float | None = None,
    device: str | None = None,
    dtype: str | None = None,
    predictor: str | Path | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> Survey:
    """Diagnose prompts, each to a page of its own, and sum them up.

    A prompt is finished once its page and its numbers are written whole; whatever ends the call, those that are
    finished stay, and the next call with the same settings goes on with the others. One that raises is noted with its
    error and does not stop the others.

    Parameters
    ----------
    prompts : iterable of str
    out : str or Path
        Folder, made where it is not there: ``index.html``; ``pages/``; ``summary`` and ``remedies`` as .csv and
        .parquet; ``summary.json``; ``cases/``, what `Diagnosis.to_dict` gives of each prompt.
    seeds : int or sequence of int
        How many seeds (0, 1, ...), or which.
    method, remedies, steps, guidance_scale
        As in `elakit.diagnose`, methods by name.
    model, device, dtype
        As `elakit.load` takes them.
    predictor : str or Path, optional
        A file that `elakit.prediction.Predictor.save` wrote.
    workers : int, optional
        Processes that draw; by default as many as there are processors, and 1 where a GPU draws. (So a script that
        calls this needs ``if __name__ == "__main__":``.)
    on_progress : callable, optional
        Called with (prompts done, prompts in all) at the start and whenever one is done.

    Returns
    -------
    Survey

    Raises
    ------
    SettingError
        No prompt or seed, an unknown method or remedy.
    OutputError
        The folder is of something else, or cannot be written to.
    """
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    every = cases(
        prompts, numbers, method=method, remedies=remedies, model=model, steps=steps, guidance_scale=guidance_scale,
        device=device, dtype=dtype, predictor=predictor,
    )  # fmt: skip
    folder = _prepare(Path(out))
    told = on_progress or (lambda done, total: None)
    try:
        outcome = sweeps.run(
            every,
            folder,
            workers=workers,
            draw=partial(draw, folder=str(folder)),
            on_progress=lambda done, total: told(done // len(numbers), total // len(numbers)),
        )
    finally:
        page = write(folder, [case.prompt for case in every])
    names = {case.key: case.prompt for case in every}
    failed = {names[key]: error for key, error in outcome.failed.items()}
    return Survey(page, outcome.there, outcome.drawn, failed)


def _prepare(folder: Path) -> Path:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "cases").is_dir()):
        raise OutputError(
            f"{folder} holds something else than diagnoses. Give a new folder, or one that an earlier call wrote to."
        )
    try:
        for name in ("cases", "pages"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The diagnoses cannot be kept in {folder}: {error.strerror or error}. Give a folder you may write to."
        ) from error
    return folder.absolute()
