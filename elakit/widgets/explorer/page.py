"""The explorer as a self-contained HTML page."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from elakit.files import check_path, write_text


def render(meta: dict[str, Any], maps: bytes, state: dict[str, Any], code: str, style: str) -> str:
    """HTML page of an explorer; the page needs no other file and no network.

    Parameters
    ----------
    meta : dict
        Data of the runs, without the maps: `Payload.meta`.
    maps : bytes
        The compressed maps: `Payload.maps`.
    state : dict
        Initial values of the explorer's settings, by name of the setting.
    code : str
        JavaScript module of the widget.
    style : str
        Style sheet of the widget.

    Returns
    -------
    str
        HTML of the page.
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
    r"""Value as JSON that can be placed inside an HTML script element.

    The characters "<", ">" and "&" are escaped, so that no string of the value can end the element.

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
    """Write a page to a file, and replace an existing file.

    If the page cannot be written completely, the existing file stays as it is.

    Parameters
    ----------
    path : str or pathlib.Path
        Path of the file, in an existing folder.
    text : str
        HTML of the page.

    Returns
    -------
    pathlib.Path
        Absolute path of the file.

    Raises
    ------
    OutputError
        The path is empty, is too long, or is an existing folder. Also raised if the folder that would contain the file
        does not exist or is not writable.

    Examples
    --------
    The folder of the file must exist:

    >>> write("no-such-folder/explorer.html", "")
    Traceback (most recent call last):
    ...
    elakit.errors.OutputError: The explorer cannot be written to no-such-folder/explorer.html: there is no folder ...
    """
    return write_text(check_path(path, "explorer", "explorer.html"), text)
