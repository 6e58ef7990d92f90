"""Module hooks that leave no trace when they are removed, and denoiser passes that hooks ignore."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_PRE, _POST = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"), ("_forward_hooks", "_forward_hooks_with_kwargs")


class Hooks:
    """Group of module hooks, which are placed together and removed together, even after an exception.

    Each hook is noted in this object before it is placed on its module. An interrupt therefore never leaves a hook
    behind.

    The hooks act only in the thread that created this object, and in threads that compute gradients. If another thread
    runs the same module, the hooks do nothing.

    If a module is copied (`copy.deepcopy`, `pickle`), the copy gets hooks that do nothing and remove themselves at the
    first call.

    Examples
    --------
    >>> module, calls = nn.Identity(), []
    >>> with Hooks() as hooks:
    ...     hooks.after(module, lambda module, args, kwargs, output: calls.append(output))
    ...     _ = module(1)
    >>> calls, len(module._forward_hooks)
    ([1], 0)
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._placed: list[tuple[nn.Module, _Hook]] = []

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.remove()

    def before(self, module: nn.Module, act: Callable[..., Any], *, first: bool = False) -> None:
        """Call ``act(module, args, kwargs)`` before each call of the module.

        With ``first``, ``act`` is called before the other hooks of the module. If ``act`` returns (args, kwargs), they
        replace the arguments of the module's call.
        """
        hook = self._note(module, act)
        module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)

    def after(self, module: nn.Module, act: Callable[..., Any], *, always: bool = False) -> None:
        """Call ``act(module, args, kwargs, output)`` after each call of the module.

        If ``act`` returns anything but None, this value replaces the module's output. With ``always``, ``act`` is also
        called if the module raised an error; ``output`` is then None.
        """
        hook = self._note(module, act)
        module.register_forward_hook(hook, with_kwargs=True, always_call=always)

    def _note(self, module: nn.Module, act: Callable[..., Any]) -> _Hook:
        hook = _Hook(act, self, self._thread)
        self._placed.append((module, hook))
        return hook

    def remove(self) -> None:
        """Remove every hook that was placed."""
        while self._placed:
            _remove(*self._placed[-1])
            self._placed.pop()


class _Alone(threading.local):
    hooks: Hooks | None = None


_ALONE = _Alone()


@contextmanager
def alone(hooks: Hooks) -> Iterator[None]:
    """Suspend the hooks of all other `Hooks` objects in this thread, inside the ``with`` block.

    Only ``hooks`` stay active. The block is meant for a separate denoiser call, made during a denoiser call of the run.
    """
    outer, _ALONE.hooks = _ALONE.hooks, hooks
    try:
        yield
    finally:
        _ALONE.hooks = outer


class _Hook:
    """Hook of the `Hooks` object ``owner``: the hook calls ``act``.

    The hook acts only in the thread with the number ``thread``, and in threads that compute gradients.
    """

    def __init__(self, act: Callable[..., Any], owner: Hooks, thread: int) -> None:
        self._act = act
        self._owner = owner
        self._thread = thread

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        if threading.get_ident() != self._thread and not _computes_gradients():
            return None
        if _ALONE.hooks is not None and _ALONE.hooks is not self._owner:
            return None
        return self._act(module, *given)

    def __reduce__(self) -> Any:
        return _Spent, ()


class _Spent:
    """Copy of a hook: it does nothing and removes itself when it is called."""

    def __call__(self, module: nn.Module, *_: Any) -> None:
        _remove(module, self)


def _remove(module: nn.Module, hook: object) -> None:
    for hooks, beside in ((vars(module)[name] for name in names) for names in (_PRE, _POST)):
        for number in [number for number, placed in hooks.items() if placed is hook]:
            del hooks[number]
            beside.pop(number, None)
            module._forward_hooks_always_called.pop(number, None)


def _computes_gradients() -> bool:
    """Return whether this thread is in a backward pass.

    Gradient checkpointing runs parts of modules again in the backward pass.
    """
    return bool(torch._C._current_graph_task_id() != -1)


_PASSES_OF_OWN: WeakKeyDictionary[nn.Module, dict[int, int]] = WeakKeyDictionary()


@contextmanager
def leave_alone(denoiser: nn.Module) -> Iterator[None]:
    """Make recording and edits ignore the forward passes of ``denoiser`` inside the ``with`` block.

    Only passes in the thread that entered the block are ignored. Blocks may be nested.
    """
    depth, thread = _PASSES_OF_OWN.setdefault(denoiser, {}), threading.get_ident()
    before = depth.get(thread, 0)
    depth[thread] = before + 1
    try:
        yield
    finally:
        depth[thread] = before


def is_left_alone(denoiser: nn.Module) -> bool:
    """Return whether this thread is inside a `leave_alone` block for ``denoiser``."""
    return _PASSES_OF_OWN.get(denoiser, {}).get(threading.get_ident(), 0) > 0
