"""Forward hooks that act only in the thread or task that registered them, also on compiled models.

All threads share a module and its hooks, and code compiled by torch ignores them. Here a hook acts only in the context
that registered it, and torch runs no compiled code while hooks must act.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from threading import RLock, get_ident
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from atv.errors import ATVError

T = TypeVar("T")


class _Scope:
    """An open context; `module` is the module whose calls it steers, if any."""

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module


_SCOPES: ContextVar[frozenset[_Scope]] = ContextVar("atv_scopes", default=frozenset())
_UNSTEERED: ContextVar[bool] = ContextVar("atv_unsteered", default=False)
_LOCK = RLock()
"""Held while hooks are added and removed: torch numbers hooks without a lock, so two threads could get one number."""


@contextmanager
def scope(module: nn.Module | None = None) -> Iterator[Callable[[], bool]]:
    """Open a context that the code inside it can recognise.

    Args:
        module: the module whose calls it steers.

    Returns:
        A function that returns whether it is called inside this context: in its thread or asyncio task, or in one that
        runs in a copy of its `contextvars` context.
    """
    mine = _Scope(module)
    _SCOPES.set(_SCOPES.get() | {mine})
    try:
        yield lambda: mine in _SCOPES.get()
    finally:
        _SCOPES.set(_SCOPES.get() - {mine})


@contextmanager
def having(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Set a context variable to a value inside this context."""
    former = variable.get()
    variable.set(value)
    try:
        yield
    finally:
        variable.set(former)  # not `reset`: a generator may be closed in another context than it was started in


def unsteered() -> AbstractContextManager[None]:
    """Calls of any LLM inside this context run unsteered, whatever contexts are open around it."""
    return having(_UNSTEERED, True)


@contextmanager
def hooked(*register: Callable[[], RemovableHandle]) -> Iterator[None]:
    """Call functions that register hooks, and remove the hooks at the end of the context."""
    with ExitStack() as handles:

        def remove(handle: RemovableHandle) -> None:
            with _LOCK:
                handle.remove()

        with _LOCK:
            for each in register:
                handles.callback(remove, each())
        yield


class _Eager:
    """Keeps torch from running compiled code while at least one context requires it."""

    def __init__(self) -> None:
        self._needed = 0
        self._stance: Any = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Lift the requirement of one context inside this context."""
        self._change(-1)
        try:
            yield
        finally:
            self._change(1)

    def _change(self, by: int) -> None:
        with _LOCK:
            before, self._needed = self._needed, self._needed + by
            if before <= 0 < self._needed:
                self._stance = torch.compiler.set_stance("force_eager")
            elif self._needed <= 0 < before:
                self._stance.__exit__(None, None, None)


eager = _Eager()
"""``with eager():`` runs compiled modules eagerly: compiled code ignores hooks that are added or removed later."""


class Calls:
    """Runs each forward call of a module inside the context that `enter` makes from the call's named arguments.

    If `enter` returns None, the call runs unchanged. A context, such as one that adds hooks, ends with its call. Use it
    as ``with calls.watched():``.

    Args:
        module: an LLM, or any module.
        enter: called before each call.
        inner: a module inside `module` that raises ATVError if it runs without a call of `module`; None: no check.
    """

    def __init__(
        self,
        module: nn.Module,
        enter: Callable[[Mapping[str, Any]], AbstractContextManager[Any] | None],
        inner: nn.Module | None = None,
    ) -> None:
        self._module, self._enter, self._inner = module, enter, inner
        self._signature = inspect.signature(module.forward)
        self._here: Callable[[], bool] | None = None  # set while calls are watched
        self._thread: int | None = None  # the thread of the current call
        self._unwatched = False  # whether later calls are not watched
        self._context = ExitStack()  # of the current call
        self._hooks = ExitStack()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the calls made inside this context; only one may be open per `Calls`."""
        with scope(self._module) as self._here:
            self.resume()
            try:
                yield
            finally:
                self._here = None
                self._hooks.close()
                self._context.close()

    def pause(self) -> None:
        """Stop watching after the current call: the module then runs without these hooks."""
        self._unwatched = True

    def resume(self) -> None:
        """Watch calls again, if they are not being watched."""
        self._unwatched, self._thread = False, None
        self._hooks.close()
        register = [
            lambda: self._module.register_forward_pre_hook(self._before, with_kwargs=True),
            lambda: self._module.register_forward_hook(self._after, always_call=True),
        ]
        if self._inner is not None:
            register.append(lambda: cast(nn.Module, self._inner).register_forward_pre_hook(self._inside))
        self._hooks.enter_context(hooked(*register))

    def _mine(self) -> bool:
        return self._here is not None and self._here() and not _UNSTEERED.get()

    def _before(self, _: nn.Module, args: Any, kwargs: Any = None) -> None:
        if not self._mine() or kwargs is None:  # None: another thread removed the hook during this call
            self._refuse_stranger()
            return
        if self._thread not in (None, get_ident()):
            raise ATVError("Two threads call the LLM at once in one steering context; open one in each of them.")
        self._context.close()  # still open if the last call ended by Ctrl-C
        self._thread = get_ident()
        entered = self._enter(self._signature.bind_partial(*args, **kwargs).arguments)
        if entered is not None:
            self._context.enter_context(entered)

    def _after(self, _: nn.Module, __: Any, output: Any) -> None:
        if not self._mine():
            return
        self._context.close()
        self._thread = None
        if self._unwatched and output is not None:  # after a failed call, torch still iterates over these hooks
            self._hooks.close()

    def _inside(self, *_: Any) -> None:
        if self._mine() and self._thread is None:
            raise ATVError(
                f"A layer of {type(self._module).__name__} was run without a call of the LLM itself, as by "
                "llm.forward(...) or llm.model(...): it would run unsteered. Call llm(...) or llm.generate(...); to "
                "run it unsteered, use: with atv.unsteered()."
            )

    def _refuse_stranger(self) -> None:
        """Raise ATVError in a thread or task that has not opened steering of this module, while another one steers it.

        Such a call may or may not be meant to be steered: for example, a thread that generates for a streamer is.
        """
        if self._here is None or _UNSTEERED.get() or any(each.module is self._module for each in _SCOPES.get()):
            return
        raise ATVError(
            f"{type(self._module).__name__} was called in a thread or task that opened no steering, while another one "
            "steers it: it is unknown whether to steer this call. Open the context in the thread that calls the LLM, "
            "or start the thread in a copy of the context (contextvars.copy_context().run); to run it unsteered, use: "
            "with atv.unsteered()."
        )


class _Watched(NamedTuple):
    """Methods of a module whose calls are watched."""

    watchers: list[tuple[Callable[[], bool], Callable[[str, Mapping[str, Any]], AbstractContextManager[Any]]]]
    former: dict[str, Any]
    """The instance's own attributes under the methods' names."""


_WATCHED: dict[nn.Module, _Watched] = {}


@contextmanager
def around_methods(
    owner: nn.Module, names: Sequence[str], enter: Callable[[str, Mapping[str, Any]], AbstractContextManager[Any]]
) -> Iterator[None]:
    """Run each call of the named methods of `owner` inside the context that `enter` makes.

    Hooks see single forward calls, but not the arguments of a method such as `generate`, nor where one call of it ends
    and the next begins. The methods are replaced on the instance, and restored when the last context closes.

    Args:
        owner: the module.
        names: names of its methods; those that it lacks are ignored.
        enter: called with a method's name and its arguments by name.
    """
    with scope() as here:
        watcher = (here, enter)
        with _LOCK:
            if owner not in _WATCHED:
                _WATCHED[owner] = _Watched([], {name: vars(owner)[name] for name in names if name in vars(owner)})
                for name in names:
                    if callable(getattr(owner, name, None)):
                        setattr(owner, name, _announced(owner, name))
            _WATCHED[owner].watchers.append(watcher)
        try:
            yield
        finally:
            with _LOCK:
                _WATCHED[owner].watchers.remove(watcher)
                if not _WATCHED[owner].watchers:
                    for name in names:
                        vars(owner).pop(name, None)
                    vars(owner).update(_WATCHED.pop(owner).former)


def _announced(owner: nn.Module, name: str) -> Callable[..., Any]:
    """Return a method of `owner` that runs inside the contexts of its watchers."""
    method = getattr(owner, name)
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
        arguments |= arguments.pop("kwargs", {})
        with ExitStack() as contexts:
            for here, enter in tuple(_WATCHED[owner].watchers) if owner in _WATCHED else ():
                if here() and not _UNSTEERED.get():
                    contexts.enter_context(enter(name, arguments))
            return method(*args, **kwargs)

    return call
