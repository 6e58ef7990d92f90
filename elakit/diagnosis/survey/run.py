"""A survey: many prompts are diagnosed by several processes; an interrupted survey is resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from elakit.diagnosis.survey.cases import Case, diagnose_case, plan_cases
from elakit.diagnosis.survey.summary import write
from elakit.errors import OutputError
from elakit.sweep.store import check_folder
from elakit.sweep.sweep import run


@dataclass(frozen=True)
class Survey:
    """Result of `diagnose_many`: the summary page, the numbers of finished prompts, and the errors of failed prompts.

    Attributes
    ----------
    page : Path
        Path of the summary page.
    earlier : int
        Number of prompts that were already finished when `diagnose_many` was called.
    diagnosed : int
        Number of prompts that this call finished.
    failed : dict of str to str
        Error of each prompt that failed, by prompt. The next call diagnoses failed prompts again.
    """

    page: Path
    earlier: int
    diagnosed: int
    failed: dict[str, str] = field(default_factory=dict)


def diagnose_many(
    prompts: Iterable[str],
    out: str | Path,
    *,
    seeds: Sequence[int] = range(4),
    workers: int | None = None,
    on_progress: Callable[[int, int], object] | None = None,
    **settings: Any,
) -> Survey:
    """Diagnose many prompts; write one page per prompt, and a summary page of all prompts.

    A prompt is finished once its page and its results are written completely. After an interruption, the next call with
    the same settings diagnoses only the unfinished prompts. A prompt whose results were deleted or damaged is diagnosed
    again. If the diagnosis of a prompt raises an exception, the error is reported, and the other prompts are diagnosed.

    Parameters
    ----------
    prompts : iterable of str
    out : str or Path
        Folder of the survey, created if necessary. ``index.html`` is the summary page, and ``pages/`` contains the
        pages of the prompts. The table of prompts is in ``summary.csv``, ``.parquet`` and ``.json``, and the table of
        remedies in ``remedies.csv`` and ``.parquet``. ``cases/`` contains the results of each prompt as JSON.
    seeds : sequence of int
        Distinct seeds of each prompt.
    workers : int, optional
        Number of processes; by default one per GPU or, without a GPU, one per CPU core. The processes import the script
        that calls this function, so the call must be inside ``if __name__ == "__main__":``.
    on_progress : callable, optional
        Called with (prompts done, prompts in total) at the start and after each prompt.
    **settings
        Settings of `elakit.diagnosis.survey.plan_cases`: method, remedies, model and so on.

    Returns
    -------
    Survey

    Raises
    ------
    SettingError
        There is no prompt or seed, a method or remedy is unknown, or a setting is outside its range.
    OutputError
        The folder contains files that do not belong to a survey, or cannot be written to.
    """
    cases = plan_cases(prompts, seeds, **settings)
    folder = _prepare(check_folder(out))
    _forget_incomplete(folder, cases)
    each = len(cases[0].seeds)
    report = on_progress or (lambda done, total: None)
    try:
        outcome = run(
            cases,
            folder,
            workers=workers,
            generate=partial(diagnose_case, folder=str(folder)),
            on_progress=lambda done, total: report(done // each, total // each),
        )
    finally:
        page = write(folder, [case.prompt for case in cases])
    names = {case.key: case.prompt for case in cases}
    failed = {names[key]: error for key, error in outcome.failed.items()}
    return Survey(page=page, earlier=outcome.earlier, diagnosed=outcome.generated, failed=failed)


def _forget_incomplete(folder: Path, cases: Sequence[Case]) -> None:
    """Mark cases as not finished if their page is missing, or if their results are missing or damaged.

    A file in ``units/`` marks a case as finished. This function deletes the file, so that the case is diagnosed again.
    """
    for case in cases:
        unit = folder / "units" / f"{case.key}.parquet"
        if unit.exists() and not (case.complete(folder) and (folder / "pages" / case.page).exists()):
            unit.unlink()


def _prepare(folder: Path) -> Path:
    try:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "cases").is_dir():
            raise OutputError(
                f"{folder} contains files that do not belong to a survey. Choose a new folder, or the folder of an "
                "earlier survey."
            )
        for name in ("cases", "pages"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"The diagnoses cannot be written to {folder}: {error.strerror or error}. Choose a folder that you may "
            "write to."
        ) from error
    return folder
