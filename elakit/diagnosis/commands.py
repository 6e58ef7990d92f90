"""Python code and command lines that reproduce a diagnosis or a remedy."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elakit.cli_options import value_of
from elakit.diagnosis.data import DiagnosisData
from elakit.diagnosis.remedies import Remedy, RemedyResult
from elakit.diagnosis.trials import DEFAULT
from elakit.errors import ElakitError
from elakit.files import read_json
from elakit.guidance import METHODS, as_code, method_options
from elakit.models import EMBEDDED, HUB_ID
from elakit.rewording import bracketed
from elakit.seeds import format_seeds


def code(diagnosis: DiagnosisData) -> str:
    """Python code that reproduces a diagnosis.

    Parameters
    ----------
    diagnosis : DiagnosisData

    Returns
    -------
    str
        Lines of code. If `elakit.load` cannot load the model again, ``...`` stands for your own pipeline. If the method
        is not in `elakit.guidance.METHODS`, ``...`` stands for your own method. Replace each ``...`` before you run the
        code; a comment names what to insert.
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
            f"    method={_method(diagnosis.method, diagnosis.options)}",
            *_remedies_argument(remedies),
            *_generation(settings),
            ")",
            'report.write(found, "report.html")',
        ]
    )


def command(diagnosis: DiagnosisData) -> str:
    """Command line that reproduces a diagnosis.

    Parameters
    ----------
    diagnosis : DiagnosisData

    Returns
    -------
    str
        Command line, or "" in four cases: `elakit.load` cannot load the model; the method is not in
        `elakit.guidance.METHODS`; an option of the method has a value that cannot be written on a command line; or a
        remedy is a method of your own, or one with changed options.
    """
    settings = diagnosis.pairs[0].plain.settings
    seeds = [pair.seed for pair in diagnosis.pairs]
    options = _set(diagnosis.method, changed(diagnosis.method, diagnosis.options))
    if options is None or not _loads(settings):
        return ""
    remedies = _remedies(diagnosis)
    if any(_different(one) != {} for one in remedies):
        return ""
    names = [one.name for one in remedies]
    words = ["elakit", "diagnose", bracketed(diagnosis.prompt), "--seeds", format_seeds(seeds)]
    words += ["--method", diagnosis.method] if diagnosis.method != "ela" else []
    words += options
    if names != list(DEFAULT):
        words += ["--remedies", ",".join(names) if names else "none"]
    return shlex.join([*words, *_settings(settings)])


def reproduce(result: RemedyResult) -> dict[str, str]:
    """Python code and command line that reproduce the images of a remedy.

    Parameters
    ----------
    result : RemedyResult

    Returns
    -------
    dict of str to str
        The value of "code" is Python code that reproduces all images. In this code, ``...`` stands for your own
        pipeline or method. The value of "command" is a command line that reproduces one image: the first right image,
        or the first image if no image is right. If the remedy has no images, both values are "". The command is also ""
        if `elakit.load` cannot load the model, or if ``elakit run`` has no options for the remedy.
    """
    if not result.runs:
        return {"code": "", "command": ""}
    return {"code": _remedy_code(result), "command": _remedy_command(result)}


def changed(name: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options of a method that differ from their defaults; None if the method is not in `elakit.guidance.METHODS`."""
    if name not in METHODS:
        return None
    defaults = {option.name: option.default for option in method_options(METHODS[name])}
    return {key: value for key, value in options.items() if key not in defaults or defaults[key] != value}


def _shown(result: RemedyResult) -> int:
    """Index of the remedy's image to reproduce: the first right image, or 0 if no image is right."""
    right = [i for i, run in enumerate(result.runs) if result.judged and run.verdict and run.verdict.success]
    return right[0] if right else 0


def _remedy_code(result: RemedyResult) -> str:
    remedy, settings = result.remedy, result.runs[0].settings
    guidance = "" if remedy.method is None else _call(remedy.method, changed(remedy.method, remedy.options) or {})
    return "\n".join(
        [
            "import elakit",
            "",
            *_loading(settings),
            "runs = elakit.generate(",
            "    pipe,",
            f"    {bracketed(remedy.prompt)!r},",
            f"    seed={[run.seed for run in result.runs]},",
            *([f"    guidance={guidance}"] if guidance else []),
            *_generation(settings),
            ")",
            f'runs[{_shown(result)}].image.save("image.png")',
        ]
    )


def _remedy_command(result: RemedyResult) -> str:
    remedy, run = result.remedy, result.runs[_shown(result)]
    if not _loads(run.settings):
        return ""
    words = ["elakit", "run", bracketed(remedy.prompt), "--seed", str(run.seed)]
    if remedy.method is not None:
        own = changed(remedy.method, remedy.options)
        regions = (own or {}).pop("regions", None)
        options = _set(remedy.method, own)
        if options is None or not (regions is None or _are_boxes(regions)):
            return ""
        words += ["--method", remedy.method, *options]
        if regions is not None:
            words += ["--regions", ";".join(",".join(f"{side:g}" for side in box) for box in regions)]
    return shlex.join([*words, *_settings(run.settings), "--out", f"run-{run.seed}"])


def _set(method: str, options: Mapping[str, Any] | None) -> list[str] | None:
    """Command-line words ``--set METHOD.OPTION=VALUE`` that set the options of a method, two words per option.

    None if `options` is None, or if the command line cannot read one of the values back from its text.
    """
    if options is None or any(value_of(str(value)) != value for value in options.values()):
        return None
    return [word for name, value in options.items() for word in ("--set", f"{method}.{name}={value}")]


def _are_boxes(regions: Any) -> bool:
    return all(
        isinstance(box, tuple | list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)
        for box in regions
    )


def _loads(settings: Mapping[str, Any]) -> bool:
    """True if `elakit.load` can load the model of a run: a built-in model, a hub id or an existing folder.

    `settings` are the settings of the run.
    """
    model = str(settings.get("model"))
    return model in EMBEDDED or bool(HUB_ID.fullmatch(model)) or Path(model).is_dir()


def _loading(settings: Mapping[str, Any]) -> list[str]:
    model = str(settings.get("model"))
    if _loads(settings):
        given = "".join(f", {name}={value!r}" for name, value in _loaded(settings).items())
        return [f"pipe = elakit.load({model!r}{given})"]
    return [f"pipe = ...  # replace ... by your own pipeline ({model}), which elakit.load cannot load"]


def _generation(settings: Mapping[str, Any]) -> list[str]:
    """Arguments that reproduce the settings of a run, as lines of Python code such as ``steps=25,``.

    The arguments are the number of steps, the guidance scale, and the arguments that `_generated` returns.
    """
    lines = [f"    steps={settings.get('steps')},", f"    guidance_scale={settings.get('guidance_scale'):g},"]
    return [*lines, *(f"    {name}={value!r}," for name, value in _generated(settings).items())]


def _loaded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `elakit.load` that differ from the defaults, by name."""
    own = {name: settings.get(name) for name in ("variant", "scheduler", "lora")}
    if own["scheduler"] == _own_scheduler(str(settings.get("model"))):
        own["scheduler"] = None
    return {name: value for name, value in own.items() if value is not None}


def _generated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Negative prompt, height and width of the image, by argument name.

    Values of None are left out. For a built-in model, the default height and width are left out, too.
    """
    model = EMBEDDED.get(str(settings.get("model")))
    usual = {} if model is None else {"height": model.size, "width": model.size}
    own = {name: settings.get(name) for name in ("negative_prompt", "height", "width")}
    return {name: value for name, value in own.items() if value is not None and value != usual.get(name)}


def _own_scheduler(model: str) -> str | None:
    """Class name of the scheduler that belongs to a model; None if the name cannot be read without a download.

    The name can be read for a built-in model and for a folder.
    """
    folder = EMBEDDED[model].path if model in EMBEDDED else Path(model)
    try:
        return str(read_json(folder / "model_index.json")["scheduler"][1])
    except (ElakitError, OSError, KeyError, TypeError, IndexError):
        return None


def _settings(settings: Mapping[str, Any]) -> list[str]:
    """Command-line options that reproduce the settings of a run.

    For a built-in model, settings that equal the model's defaults are left out.
    """
    model = EMBEDDED.get(str(settings.get("model")))
    words = [] if model is not None and model.name == "picture-world" else ["--model", str(settings.get("model"))]
    if model is None or settings.get("steps") != model.steps:
        words += ["--steps", str(settings.get("steps"))]
    if model is None or settings.get("guidance_scale") != model.guidance_scale:
        words += ["--scale", f"{settings.get('guidance_scale'):g}"]
    for name, value in {**_generated(settings), **_loaded(settings)}.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _remedies(diagnosis: DiagnosisData) -> list[Remedy]:
    """Remedies of a diagnosis without its method: first those named in `DEFAULT`, in that order, then the others."""
    tried = {one.remedy.name: one.remedy for one in diagnosis.remedies if one.remedy.name != diagnosis.method}
    return [tried[name] for name in (*DEFAULT, *(name for name in tried if name not in DEFAULT)) if name in tried]


def _different(remedy: Remedy) -> dict[str, Any] | None:
    """Options in which a remedy differs from the method of the same name with its defaults.

    The result is empty for a remedy that is not a guidance method, and None for a method of your own.
    """
    return changed(remedy.name, remedy.options) if remedy.kind == "guidance" else {}


def _remedies_argument(remedies: Sequence[Remedy]) -> list[str]:
    """Lines of Python code with the argument ``remedies`` of `elakit.diagnose`; empty without remedies."""
    if not remedies:
        return []
    if all(_different(one) == {} for one in remedies):
        return [f"    remedies={[one.name for one in remedies]!r},"]
    return [
        "    remedies=[",
        *(
            f"        {_method(one.name, one.options)}" if one.kind == "guidance" else f"        {one.name!r},"
            for one in remedies
        ),
        "    ],",
    ]


def _method(name: str, options: Mapping[str, Any]) -> str:
    """Guidance method as an argument in Python code, followed by a comma.

    The code is the name, such as ``'ela',``, if all options have their defaults; otherwise it is the result of `_call`.
    """
    different = changed(name, options)
    return f"{name!r}," if different == {} else _call(name, different or {})


def _call(name: str, options: Mapping[str, Any]) -> str:
    """Python code that creates a guidance method, followed by a comma: ``elakit.guidance.ELA(size=8),``.

    For a method that is not in `METHODS`, the result is ``...,`` and a comment with the name of the method.
    """
    if name not in METHODS:
        return f"...,  # replace ... by your own method {name!r}"
    return f"{as_code(METHODS[name], options)},"
