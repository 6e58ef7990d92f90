"""Types of the objects that elakit accepts as a pipeline."""

from __future__ import annotations

from typing import Any, Protocol


class Pipeline(Protocol):
    """A diffusers pipeline of any supported family.

    Its components (``unet`` or ``transformer``, text encoders, ``vae``, ``scheduler``) depend on the family, so
    attribute access is not checked any further.

    Examples
    --------
    >>> def describe(pipe: Pipeline) -> str:
    ...     return type(pipe.scheduler).__name__
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate images."""

    def __getattr__(self, name: str) -> Any:
        """A component or a method of the pipeline."""


class HasTokenizer(Protocol):
    """Any object with a CLIP tokenizer, which suffices to parse a prompt, because parsing runs no model."""

    tokenizer: Any
