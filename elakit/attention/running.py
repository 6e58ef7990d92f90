"""Identification of the denoiser calls that belong to a recorded or edited run, and of their rows that see the prompt.

When the denoiser is called, elakit finds the pipeline that is running. This pipeline need not be the one that was given
to `record`. The running pipeline shows whether the call belongs to the run, and which rows of the batch see the prompt.
In a loop without a pipeline, elakit compares the text states that the denoiser receives with the text states of the
prompt.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from elakit.attention.hooks import is_left_alone
from elakit.errors import ModelError, RecordingError, clause
from elakit.models import Adapter, Call, adapter_for
from elakit.models.adapter import argument
from elakit.pipeline import Pipeline
from elakit.prompt import Prompt

# Rounding of half precision, and of batches of different sizes, changes a text state by less.
_SAME_STATE = 0.05
_CACHES = ("cache", "fbc_", "pyramid_attention_broadcast", "taylorseer")


@dataclass(frozen=True)
class SeenCall:
    """One call of the denoiser that sees the prompt.

    Attributes
    ----------
    call : Call
        Batch size, timestep and latent size of the call.
    rows : slice
        Rows of the batch that see the prompt.
    adapter : Adapter
        Adapter of the pipeline that is running.
    text : int or None
        Number of text positions, if image tokens may follow them (FLUX Redux); None if all positions are text.
    """

    call: Call
    rows: slice
    adapter: Adapter
    text: int | None = None


class Watch:
    """Recognizer of the denoiser calls of one run, or of several runs that follow each other.

    It ignores passes in other threads, and passes inside `elakit.attention.paused`, such as the passes of guidance. It
    also ignores a run inside a run, for example an image that a callback generates with the same denoiser.

    Parameters
    ----------
    adapter : Adapter
        Adapter of the pipeline whose denoiser is watched.
    prompt : Prompt, optional
        The prompt that the runs must have. None accepts every prompt.

    Raises
    ------
    RecordingError
        Raised when the denoiser has a cache that skips attention layers.
    """

    def __init__(self, adapter: Adapter, prompt: Prompt | None = None) -> None:
        self.adapter = adapter
        self.prompt = prompt
        self.loop_sees_prompt = False  # whether every row of a loop without a pipeline is known to see the prompt
        self._thread = threading.get_ident()
        self._run: FrameType | None = None  # the pipeline's call that is running; compared by identity
        self._of_run = adapter
        self._by_states = False  # whether the run was given text states instead of a text
        self._states: tuple[Tensor, slice] | None = None  # of a loop without a pipeline, and its rows
        self._expected: Tensor | None = None
        names = list(inspect.signature(type(adapter.denoiser).forward).parameters)[1:]
        self._states_at = names.index("encoder_hidden_states") if "encoder_hidden_states" in names else None
        refuse_caches(adapter.denoiser)

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> SeenCall | None:
        """Identify a denoiser call from its arguments, before the call runs.

        Returns
        -------
        SeenCall or None
            None if the call does not belong to a watched run, or does not see the prompt.

        Raises
        ------
        RecordingError
            Raised when the run has a prompt other than the expected prompt, or several prompts. Also raised when the
            rows that see the prompt cannot be determined, or when the denoiser has a cache that skips attention layers.
        """
        if threading.get_ident() != self._thread or is_left_alone(self.adapter.denoiser):
            return None
        runs = list(_running(self.adapter.denoiser))
        if not runs:
            return self._read_loop(args, kwargs)
        frame, pipe = runs[0]
        begins = frame is not self._run
        if begins:
            if any(outer is self._run for outer, _ in runs[1:]):
                return None
            self._begin(frame, pipe)
        call = self._of_run.read_call(args, kwargs)
        if not call.conditional:
            return None
        rows = self._of_run.conditional_rows(call.batch)
        states = self._text_states(args, kwargs)
        if begins and states is not None and self.prompt is not None:
            self._check_rows(states[rows])
        return SeenCall(call, rows, self._of_run, self._text_positions(states))

    def close(self) -> None:
        """Forget the last run, so that its memory can be freed."""
        self._run = self._states = None
        self._of_run = self.adapter

    def _begin(self, frame: FrameType, pipe: Pipeline) -> None:
        """At the first call of a run, check its prompt and the caches of the denoiser, and remember the run.

        ``pipe`` is the pipeline that runs; ``frame`` is the stack frame of its ``__call__``.
        """
        refuse_caches(self.adapter.denoiser)
        adapter = self.adapter if pipe is self.adapter.pipe else adapter_for(pipe)
        if self.prompt is not None:
            self._check_text(adapter, frame.f_locals)
            self._by_states = not attended_texts(adapter, frame.f_locals)
        self._run, self._of_run = frame, adapter

    def _check_text(self, adapter: Adapter, given: Mapping[str, Any]) -> None:
        """Raise a `RecordingError` if the prompt of a run differs from the prompt to record or to edit.

        ``given`` contains the arguments of the pipeline's call, by name.
        """
        assert self.prompt is not None
        for name in attended_texts(adapter, given):
            texts = [given[name]] if isinstance(given[name], str) else given[name]
            for text in texts:
                if text != self.prompt.text and not _same_tokens(adapter, text, self.prompt.text):
                    raise RecordingError(
                        f"{type(adapter.pipe).__name__} was called with {name}={text!r}, but the prompt to record or "
                        f"to edit is {self.prompt.text!r}. Call the pipeline with `prompt.text`, and use a separate "
                        "`with` block for each prompt."
                    )

    def _check_rows(self, states: Tensor) -> None:
        """Refuse text states of several prompts in one batch, and text states that are the same for all words."""
        assert self.prompt is not None
        words = [token.index for token in self.prompt.tokens if token.index < states.shape[1]]
        if self._by_states and len(words) > 1 and bool((states[:, words] == states[:, words[:1]]).all()):
            raise RecordingError(
                f"The text states (prompt_embeds) are the same for every word of {self.prompt.text!r}, so attention "
                "cannot tell the words apart. Encode the prompt with `pipe.encode_prompt`. To use the text states of "
                "FluxPriorReduxPipeline, load it with text encoders and tokenizers, and call it with a prompt."
            )
        if len(states) > 1 and not self._agree(states, states[:1]).all():
            raise RecordingError(
                "The batch contains different prompts: its rows have different text states. Run the pipeline once per "
                "prompt, and use a separate `with` block for each run."
            )

    # -- loops without a pipeline ------------------------------------------------------------------------------------

    def _read_loop(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> SeenCall | None:
        self._run, self._of_run = None, self.adapter
        call = self.adapter.read_call(args, kwargs)
        if not call.conditional:
            return None
        states = self._text_states(args, kwargs)
        if self.loop_sees_prompt:
            rows = slice(0, call.batch)
        elif self.prompt is None:
            rows = self.adapter.conditional_rows(call.batch)
        elif self._states is not None and states is self._states[0]:
            rows = self._states[1]
        else:
            rows = self._rows_with_prompt(states)
            self._states = (states, rows) if states is not None else None
        return SeenCall(call, rows, self.adapter, self._text_positions(states))

    def _rows_with_prompt(self, states: Tensor | None) -> slice:
        """Rows whose text states are those of the prompt."""
        if states is None:
            raise RecordingError(
                f"A loop of your own that calls the denoiser cannot be recorded or edited with {self.adapter.family}, "
                "because the text states of these calls cannot be compared with the prompt. Call the pipeline instead."
            )
        where = self._agree(states, self._prompt_states(states)).nonzero().flatten().tolist()
        assert self.prompt is not None
        if where and where != list(range(where[0], where[-1] + 1)):
            raise RecordingError(
                f"{type(self.adapter.denoiser).__name__} was called without a pipeline. In its batch, the rows {where} "
                f"have the text states of {self.prompt.text!r}, but are not adjacent. Put these rows next to each "
                "other."
            )
        if not where:
            raise RecordingError(
                f"{type(self.adapter.denoiser).__name__} was called without a pipeline, and no row of its batch has "
                f"the text states of {self.prompt.text!r}. Call the pipeline, or give the denoiser the text states "
                "from `pipe.encode_prompt(prompt.text, ...)`. Denoiser calls that do not see this prompt belong "
                "inside `with elakit.attention.paused(pipe):`."
            )
        return slice(where[0], where[-1] + 1)

    def _prompt_states(self, like: Tensor) -> Tensor:
        assert self.prompt is not None
        if self._expected is None:
            try:
                states = self.adapter.encode(self.prompt.text, guided=False).inputs.get("encoder_hidden_states")
            except (ModelError, AttributeError) as error:
                raise RecordingError(
                    f"Denoiser calls outside pipe(...) cannot be recorded or edited: {clause(error)}. Call the "
                    "pipeline instead."
                ) from error
            if not isinstance(states, Tensor):
                raise RecordingError(
                    f"Denoiser calls outside pipe(...) cannot be recorded or edited with {self.adapter.family}. Call "
                    "the pipeline instead."
                )
            self._expected = states
        return self._expected.to(like.device)

    def _agree(self, states: Tensor, expected: Tensor) -> Tensor:
        """Compare rows with the expected states at the positions of the prompt's words; returns booleans, (rows,)."""
        assert self.prompt is not None
        length = min(states.shape[1], expected.shape[1])
        words = [token.index for token in self.prompt.tokens if token.index < length]
        if states.shape[-1] != expected.shape[-1] or not words:
            return torch.zeros(len(states), dtype=torch.bool)
        states, expected = states[:, words].float(), expected[:, words].float()
        return (states - expected).abs().amax((1, 2)) <= _SAME_STATE * expected.abs().amax()

    def _text_states(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return the text states in a denoiser call, (rows, positions, channels); None if there is no such tensor."""
        if self._states_at is None:
            return None
        states = argument(args, kwargs, self._states_at, "encoder_hidden_states")
        return states if isinstance(states, Tensor) and states.ndim == 3 else None

    def _text_positions(self, states: Tensor | None) -> int | None:
        limit = getattr(self._of_run, "text_limit", None)
        return None if limit is None or states is None else min(states.shape[1], limit)


def attended_texts(adapter: Adapter, given: Mapping[str, Any]) -> list[str]:
    """Return the names of the pipeline arguments that contain the texts to which the image attends.

    ``given`` contains the arguments of one pipeline call, by name. In FLUX.1, for example, the result is
    ``["prompt_2"]`` if ``prompt_2`` is given, and ``["prompt"]`` otherwise. The result is empty if the call has text
    states instead of texts.
    """
    groups: Sequence[Sequence[str]] = getattr(adapter, "text_arguments", (("prompt",), ("prompt_2",), ("prompt_3",)))
    found = (next((name for name in group if given.get(name) is not None), None) for group in groups)
    return [name for name in found if name is not None]


def _same_tokens(adapter: Adapter, text: str, other: str) -> bool:
    def ids(tokenizer: Any, one: str) -> list[int]:
        return list(tokenizer(one, truncation=False, padding=False, verbose=False)["input_ids"])

    try:
        return all(
            ids(sequence.tokenizer, sequence.read(text)) == ids(sequence.tokenizer, sequence.read(other))
            for sequence in adapter.text()
        )
    except (TypeError, ValueError, AttributeError, KeyError):  # not a text
        return False


def _running(denoiser: nn.Module) -> Any:
    """Yield the pipeline calls that use this denoiser and are running in the current thread, innermost call first.

    Each call is yielded as a pair: the stack frame of ``__call__``, and the pipeline.
    """
    from diffusers import DiffusionPipeline  # already imported by the code that made the denoiser

    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            pipe = frame.f_locals.get("self")
            if isinstance(pipe, DiffusionPipeline) and any(
                getattr(pipe, name, None) is denoiser for name in ("unet", "transformer")
            ):
                yield frame, pipe
        frame = frame.f_back


def refuse_caches(denoiser: nn.Module) -> None:
    """Refuse a denoiser with a cache that skips attention layers in some calls.

    Raises
    ------
    RecordingError
        Raised when a cache is enabled; the message names it.
    """
    for name, module in denoiser.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}):
            if any(part in hook for part in _CACHES):
                raise RecordingError(
                    f"{type(denoiser).__name__} has a cache ({hook}{f' at {name}' if name else ''}). With a cache, "
                    "layers are skipped in some denoiser calls, so their attention cannot be recorded or edited. "
                    "Disable the cache first, for example with `pipe.transformer.disable_cache()`."
                )
