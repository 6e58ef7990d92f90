"""Command-line options that several commands share, functions that read options, and one-line error messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from elakit.errors import ElakitError, SettingError

DTYPES = ("float32", "float16", "bfloat16")

# backslashes, because rich, which renders the help, would take the brackets for markup
PROMPT = (
    r'Prompt, such as "a cat and a lion". Its entities are found with spaCy, or marked by brackets, and then only '
    r'these are used: "a \[red car] and a \[bird]".'
)
PROMPTS_FILE = (
    "text with one prompt per line, or JSON, JSON Lines, CSV, TSV or Parquet with the key or column `prompt`, `text` "
    "or `caption`"
)
Prompt = Annotated[str, typer.Argument(help=PROMPT)]
Model = Annotated[str, typer.Option(help="picture-world (built in), a folder, or a hub id such as org/model.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, or one GPU such as cuda:1. Default: cuda if available; several workers use all GPUs."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help=f"Data type of the weights: {', '.join(DTYPES)}. Default: float32 on a CPU and for picture-world, else "
        "float16."
    ),
]
Seeds = Annotated[str, typer.Option(help="Seeds and ranges of seeds, separated by commas, such as 0-3 or 2,5,8.")]
Steps = Annotated[int | None, typer.Option(help="Number of denoising steps. Default: the model's (picture-world: 25).")]
Scale = Annotated[float | None, typer.Option(help="Classifier-free guidance scale. Default: the model's.")]
Negative = Annotated[
    str | None,
    typer.Option(
        "--negative-prompt", help="Description of content to avoid; has an effect only with a guidance scale above 1."
    ),
]
Height = Annotated[int | None, typer.Option(help="Height of the image in pixels. Default: the model's.")]
Width = Annotated[int | None, typer.Option(help="Width of the image in pixels. Default: the model's.")]
Scheduler = Annotated[
    str | None, typer.Option(help="Scheduler class of diffusers, such as DDIMScheduler. Default: the model's.")
]
Lora = Annotated[str | None, typer.Option(help="LoRA weights (safetensors): a file, a folder or a hub id.")]
Variant = Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Option of --method as METHOD.OPTION=VALUE, such as ela.anchor.step_size=0.2; `elakit sweep methods` "
        "lists the options. Can be repeated.",
    ),
]


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Context in which an `ElakitError` ends the program with a one-line message instead of a traceback.

    An `ElakitError` is an error that the user can act on. Ctrl+C also ends the program with one line. Other exceptions
    are raised as usual.

    Parameters
    ----------
    program : str
        Name of the program, printed at the beginning of the line.
    """
    try:
        yield
    except ElakitError as error:
        typer.secho(f"{program}: {error}", fg="red", err=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        typer.secho(f"{program}: interrupted", fg="red", err=True)
        raise SystemExit(130) from None


def without_markup(docstring: str) -> str:
    """Text of a docstring for a help page, with less markup of reStructuredText.

    Double backquotes become single ones, ``**`` is removed, and a double colon at the end of a line becomes a single
    one. A line break before a letter, a backquote or an opening parenthesis becomes a space, because help pages wrap
    lines themselves. Blank lines, indented lines and list items keep their line breaks.

    Examples
    --------
    >>> without_markup("**Example**::\\n\\n    run ``draw``")
    'Example:\\n\\n    run `draw`'
    >>> without_markup("One line\\nand another.")
    'One line and another.'
    """
    plain = docstring.replace("``", "`").replace("**", "").replace("::\n", ":\n")
    return re.sub(r"(?<=\S)\n(?=[A-Za-z`(])", " ", plain)  # help pages wrap lines themselves; lists keep theirs


def value_of(text: str) -> Any:
    """Value of an option: a Python literal, or the text itself.

    Examples
    --------
    >>> value_of("0.5"), value_of("(1, 2)"), value_of("otsu")
    (0.5, (1, 2), 'otsu')
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text  # a bare word, such as gradient=raw


def method_options(method: str, settings: list[str] | None) -> dict[str, Any]:
    """Options of a method, by name, from settings of the form ``METHOD.OPTION=VALUE``.

    Parameters
    ----------
    method : str
        Name of the method.
    settings : list of str or None
        Settings as given on the command line; None for none.

    Raises
    ------
    SettingError
        A setting does not have the form ``METHOD.OPTION=VALUE``, names another method, or is given twice.

    Examples
    --------
    >>> method_options("ela", ["ela.anchor.step_size=0.2"])
    {'anchor.step_size': 0.2}
    """
    options: dict[str, Any] = {}
    for setting in settings or []:
        target, equals, value = setting.partition("=")
        named, dot, option = target.strip().partition(".")
        if not (equals and dot and option):
            raise SettingError(f"--set {setting}: write METHOD.OPTION=VALUE, such as ela.anchor.step_size=0.2.")
        if named != method:
            raise SettingError(
                f"--set {setting}: the method is {method}. Write {method}.{option}=..., or change --method."
            )
        if option in options:
            raise SettingError(f"--set {setting}: {target.strip()} is set twice. Give it once.")
        options[option] = value_of(value.strip())
    return options


def load_pipeline(model: str, **settings: Any) -> Any:
    """Pipeline as `elakit.load` returns it, loaded without the progress bars of diffusers and transformers."""
    import elakit
    from elakit.models.library import hide_loading_bars

    hide_loading_bars()  # they would hide the progress of the command
    return elakit.load(model, **settings)
