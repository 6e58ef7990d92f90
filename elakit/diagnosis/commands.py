"""The Python and the command line that do it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elakit.diagnosis.remedies import DEFAULT, Tried
from elakit.guidance import METHODS, as_code, method_options
from elakit.models import EMBEDDED, HUB_ID
from elakit.rewording import bracketed

if TYPE_CHECKING:
    from elakit.diagnosis.result import Diagnosis


def code(diagnosis: Diagnosis) -> str:
    """Python that makes a diagnosis again.

    Parameters
    ----------
    diagnosis : Diagnosis
    """
    settings = diagnosis.pairs[0].plain.settings
    seeds = [pair.seed for pair in diagnosis.pairs]
    remedies = _remedies(diagnosis)
    return "\n".join(
        [
            "import elakit",
            "from elakit.diagnosis import report",
            "",
            *_loading(settings),
            "found = elakit.diagnose(",
            "    pipe,",
            f"    {bracketed(diagnosis.prompt)!r},",
            f"    seeds={seeds},",
            f"    method={_method(diagnosis.method, diagnosis.options)},",
            *([f"    remedies={remedies!r},"] if remedies else []),
            f"    steps={settings.get('steps')},",
            f"    guidance_scale={settings.get('guidance_scale'):g},",
            ")",
            'report.write(found, "report.html")',
        ]
    )


def command(diagnosis: Diagnosis) -> str:
    """The command line that makes a diagnosis again; "" where none does (options of methods, seeds with gaps).

    Parameters
    ----------
    diagnosis : Diagnosis
    """
    settings = diagnosis.pairs[0].plain.settings
    seeds = [pair.seed for pair in diagnosis.pairs]
    if seeds != list(range(seeds[0], seeds[0] + len(seeds))) or _changed(diagnosis.method, diagnosis.options) != {}:
        return ""
    remedies = _remedies(diagnosis)
    words = ["elakit", "diagnose", bracketed(diagnosis.prompt), "--seeds", str(len(seeds))]
    words += ["--first-seed", str(seeds[0])] if seeds[0] else []
    words += ["--method", diagnosis.method] if diagnosis.method != "ela" else []
    if remedies != list(DEFAULT):
        words += ["--remedies", ",".join(remedies) if remedies else "none"]
    return shlex.join([*words, *_settings(settings)])


def again(tried: Tried) -> dict[str, str]:
    """What draws a remedy's images again: {"code": Python, "command": command line, "" where none does}.

    Parameters
    ----------
    tried : Tried
    """
    if not tried.runs:
        return {"code": "", "command": ""}
    return {"code": _draw_code(tried), "command": _draw_command(tried)}


def shown(tried: Tried) -> int:
    """Which of a remedy's images to draw again: the first that is right, else the first."""
    right = [i for i, run in enumerate(tried.runs) if tried.judged and run.verdict and run.verdict.success]
    return right[0] if right else 0


def _draw_code(tried: Tried) -> str:
    remedy, settings = tried.remedy, tried.runs[0].settings
    guidance = _guidance(remedy.method, remedy.options)
    return "\n".join(
        [
            "import elakit",
            "",
            *_loading(settings),
            "runs = elakit.generate(",
            "    pipe,",
            f"    {bracketed(remedy.prompt)!r},",
            f"    seed={[run.seed for run in tried.runs]},",
            *([f"    guidance={guidance},"] if guidance else []),
            f"    steps={settings.get('steps')},",
            f"    guidance_scale={settings.get('guidance_scale'):g},",
            ")",
            f'runs[{shown(tried)}].image.save("image.png")',
        ]
    )


def _draw_command(tried: Tried) -> str:
    remedy, run = tried.remedy, tried.runs[shown(tried)]
    words = ["elakit", "run", bracketed(remedy.prompt), "--seed", str(run.seed)]
    if remedy.method is not None:
        changed = _changed(remedy.method, remedy.options)
        if changed is None or set(changed) - {"regions"}:
            return ""
        words += ["--method", remedy.method]
        if "regions" in changed:
            if not _are_boxes(changed["regions"]):
                return ""
            boxes = ";".join(",".join(f"{side:g}" for side in box) for box in changed["regions"])
            words += ["--regions", boxes]
    return shlex.join([*words, *_settings(run.settings), "--out", f"run-{run.seed}"])


def _are_boxes(regions: Any) -> bool:
    return all(
        isinstance(box, tuple | list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)
        for box in regions
    )


def _loading(settings: Mapping[str, Any]) -> list[str]:
    model = str(settings.get("model"))
    if model in EMBEDDED or HUB_ID.fullmatch(model) or Path(model).is_dir():
        return [f"pipe = elakit.load({model!r})"]
    return [f"pipe = ...  # your own {model}"]


def _settings(settings: Mapping[str, Any]) -> list[str]:
    """Options of the command line for what is not as the embedded model has it by default."""
    model = EMBEDDED.get(str(settings.get("model")))
    words = [] if model is not None and model.name == "picture-world" else ["--model", str(settings.get("model"))]
    if model is None or settings.get("steps") != model.steps:
        words += ["--steps", str(settings.get("steps"))]
    if model is None or settings.get("guidance_scale") != model.guidance_scale:
        words += ["--scale", f"{settings.get('guidance_scale'):g}"]
    return words


def _remedies(diagnosis: Diagnosis) -> list[str]:
    """The remedies that were asked for beside the method, in the order in which they are tried."""
    names = [tried.remedy.name for tried in diagnosis.remedies if tried.remedy.name != diagnosis.method]
    order: Sequence[str] = [*DEFAULT, *(name for name in names if name not in DEFAULT)]
    return [name for name in order if name in names]


def _method(name: str, options: Mapping[str, Any]) -> str:
    """A method as code: its name where every option has its default."""
    changed = _changed(name, options)
    return repr(name) if not changed else _call(name, changed)


def _guidance(name: str | None, options: Mapping[str, Any]) -> str:
    """A method as code that builds it."""
    return "" if name is None else _call(name, _changed(name, options) or {})


def _call(name: str, changed: Mapping[str, Any]) -> str:
    if name not in METHODS:
        return f"...  # your own {name}"
    return as_code(METHODS[name], changed)


def _changed(name: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options that are not as by default; None for a method that is not one of ours."""
    if name not in METHODS:
        return None
    defaults = {option.name: option.default for option in method_options(METHODS[name])}
    return {key: value for key, value in options.items() if key not in defaults or defaults[key] != value}
