"""From finished runs to findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elakit.causes.findings import Findings
from elakit.errors import SettingError
from elakit.generate import Run


def find(pipe: Any, runs: Sequence[Run]) -> Findings:
    """Find what goes wrong in runs of one prompt, and why.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        That drew them: its text encoder is asked again.
    runs : sequence of Run
        Recorded, of one prompt, a seed each.

    Returns
    -------
    Findings

    Raises
    ------
    SettingError
        No run, or runs of different prompts.
    RecordingError
        A run was not recorded.
    """
    if not runs:
        raise SettingError("There is no run to look at; draw some: elakit.generate(pipe, prompt, seed=[0, 1, 2, 3]).")
    if len({run.prompt.text for run in runs}) > 1:
        raise SettingError("The runs are of different prompts; give those of one prompt, a seed each.")
    for run in runs:
        run.entity_maps()
    seeds = tuple(run.seed for run in runs)
    return Findings(runs[0].prompt, seeds, all(run.verdict is not None for run in runs))
