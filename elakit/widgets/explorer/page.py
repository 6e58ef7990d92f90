"""The explorer as one page that needs nothing but itself."""

from __future__ import annotations

import base64
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from elakit.errors import OutputError


def render(meta: dict[str, Any], maps: bytes, state: dict[str, Any], code: str, style: str) -> str:
    """The page.

    Parameters
    ----------
    meta : dict
        As `describe` gives it.
    maps : bytes
        Deflated.
    state : dict
        The settings that the page opens with.
    code, style : str
        The widget's module and its style sheet.

    Returns
    -------
    str
        HTML.
    """
    environment = Environment(
        loader=PackageLoader("elakit.widgets.explorer", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    prompts = dict.fromkeys(run["prompt"] for run in meta["runs"])
    return environment.get_template("page.html.jinja").render(
        title=" / ".join(prompts),
        data=script_json({"_meta": meta, **state}),
        maps=base64.b64encode(maps).decode("ascii"),
        code=Markup(code),
        style=Markup(style),
    )


def script_json(value: Any) -> Markup:
    r"""JSON that may stand in a script element, whatever its strings hold.

    Examples
    --------
    >>> print(script_json(["</script><b>"]))
    ["\u003c/script\u003e\u003cb\u003e"]
    """
    text = json.dumps(value, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def write(path: str | Path, text: str) -> Path:
    """Write a file whole or not at all; one that is there is replaced.

    Parameters
    ----------
    path : str or pathlib.Path
    text : str

    Returns
    -------
    pathlib.Path
        Absolute.

    Raises
    ------
    OutputError
        The path is a folder, or its folder does not exist or may not be written to.

    Examples
    --------
    >>> write("no-such-folder/explorer.html", "")
    Traceback (most recent call last):
    ...
    elakit.errors.OutputError: The explorer cannot be written to no-such-folder/explorer.html: there is no folder ...
    """
    target = Path(path).expanduser().absolute()
    wrong = f"The explorer cannot be written to {path}:"
    if not str(path) or target.is_dir():
        raise OutputError(f"{wrong} it is a folder. Give the name of a file, such as {Path(path, 'explorer.html')}.")
    if not target.parent.is_dir():
        raise OutputError(
            f"{wrong} there is no folder {target.parent}. Create it (mkdir -p) or choose one that exists."
        )
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        raise OutputError(f"{wrong} {error.strerror or error}. Choose a path you may write to.") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return target
