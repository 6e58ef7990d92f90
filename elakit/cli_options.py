"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

DTYPES = ("float32", "float16", "bfloat16")

# backslashes, because rich, which renders the help, would take the brackets for markup
PROMPT = r'For example "a cat and a lion". Brackets mark entities: "a \[red car] and a \[bird]".'
Prompt = Annotated[str, typer.Argument(help=PROMPT)]
Model = Annotated[str, typer.Option(help="picture-world (embedded), a folder, or a hub id such as org/model.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if available.")]
Dtype = Annotated[
    str | None, typer.Option(help=f"Data type of the weights: {', '.join(DTYPES)}. Default: float32 on a CPU.")
]
Steps = Annotated[int | None, typer.Option(help="Number of denoising steps. Default: the model's (picture-world: 25).")]
Scale = Annotated[float | None, typer.Option(help="Classifier-free guidance scale. Default: the model's.")]
