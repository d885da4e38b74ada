"""Which calls of a frozen LLM are somebody's own: contexts that neither other threads nor compiled code slip past.

Forward hooks sit on modules that every thread shares, and code that torch has compiled does not notice them. Here a
hook acts in the context that registered it and nowhere else, and torch runs no compiled code while hooks must be seen.
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
    """An open context; `module` is the one whose calls it steers, if any."""

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module


_SCOPES: ContextVar[frozenset[_Scope]] = ContextVar("atv_scopes", default=frozenset())
_UNSTEERED: ContextVar[bool] = ContextVar("atv_unsteered", default=False)
_LOCK = RLock()
"""Held while hooks are added and removed: torch numbers them without one, so that two threads could get one number."""


@contextmanager
def scope(module: nn.Module | None = None) -> Iterator[Callable[[], bool]]:
    """A context that the code inside it can recognise.

    Args:
        module: whose calls it steers.

    Returns:
        A function that tells whether it is called inside this context: in its thread or asyncio task, or in one that
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
    """Give a context variable a value inside this context."""
    former = variable.get()
    variable.set(value)
    try:
        yield
    finally:
        variable.set(former)  # not `reset`: a generator may be closed in another context than it was begun in


def unsteered() -> AbstractContextManager[None]:
    """Calls of any LLM inside this context run as if nobody steered it, whatever contexts are open around it."""
    return having(_UNSTEERED, True)


@contextmanager
def hooked(*register: Callable[[], RemovableHandle]) -> Iterator[None]:
    """Register hooks, one by each of the functions, and remove them at the end."""
    with ExitStack() as handles:

        def remove(handle: RemovableHandle) -> None:
            with _LOCK:
                handle.remove()

        with _LOCK:
            for each in register:
                handles.callback(remove, each())
        yield


class _Eager:
    """Keeps torch from running compiled code while at least one context needs that."""

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
        """Take back one context's need, while the context lasts."""
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
"""``with eager():`` runs what was compiled as it is written: compiled code does not see that a hook came or went."""


class Calls:
    """Runs each forward call of a module inside the context that `enter` makes from the call's named arguments.

    Where `enter` gives None the call runs as if nothing were here, but for that look at its arguments: what a context
    put into the module, its hooks above all, is gone when its call has ended. Use it by ``with calls.watched():``.

    Args:
        module: an LLM, or any module.
        enter: called before each call.
        inner: a module inside it; run without a call of `module`, it raises ATVError. None: no such check.
    """

    def __init__(
        self,
        module: nn.Module,
        enter: Callable[[Mapping[str, Any]], AbstractContextManager[Any] | None],
        inner: nn.Module | None = None,
    ) -> None:
        self._module, self._enter, self._inner = module, enter, inner
        self._signature = inspect.signature(module.forward)
        self._here: Callable[[], bool] | None = None  # while it is watched
        self._thread: int | None = None  # that a call runs in
        self._unwatched = False  # the next calls are
        self._context = ExitStack()  # of the current call
        self._hooks = ExitStack()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the calls that are made inside this context; one at a time of each `Calls`."""
        with scope(self._module) as self._here:
            self.resume()
            try:
                yield
            finally:
                self._here = None
                self._hooks.close()
                self._context.close()

    def pause(self) -> None:
        """Watch no more calls from the end of the current one on: the module then runs without a hook of this."""
        self._unwatched = True

    def resume(self) -> None:
        """Watch the calls, if they are not watched already."""
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
        if not self._mine() or kwargs is None:  # None: removed by its thread after torch had looked it up in this one
            self._refuse_stranger()
            return
        if self._thread not in (None, get_ident()):
            raise ATVError("Two threads call the LLM at once in one steering context; open one in each of them.")
        self._context.close()  # open still if the last call ended by no Exception (Ctrl-C)
        self._thread = get_ident()
        entered = self._enter(self._signature.bind_partial(*args, **kwargs).arguments)
        if entered is not None:
            self._context.enter_context(entered)

    def _after(self, _: nn.Module, __: Any, output: Any) -> None:
        if not self._mine():
            return
        self._context.close()
        self._thread = None
        if self._unwatched and output is not None:  # of a call that failed, torch is going through these very hooks
            self._hooks.close()

    def _inside(self, *_: Any) -> None:
        if self._mine() and self._thread is None:
            raise ATVError(
                f"A layer of {type(self._module).__name__} was run without a call of the LLM itself, as by "
                "llm.forward(...) or llm.model(...): it would run unsteered. Call llm(...) or llm.generate(...); if "
                "no steering is wanted, say so: with atv.unsteered()."
            )

    def _refuse_stranger(self) -> None:
        """Raise ATVError in a thread or task that has opened no steering of this module, while another one steers it.

        It may be meant to be steered, as a thread that generates for a streamer, or not to be.
        """
        if self._here is None or _UNSTEERED.get() or any(each.module is self._module for each in _SCOPES.get()):
            return
        raise ATVError(
            f"{type(self._module).__name__} was called in a thread or task that opened no steering, while another one "
            "steers it: whether this call is to be steered cannot be told. Open the context in the thread that calls "
            "the LLM, or start the thread in a copy of the context (contextvars.copy_context().run); if no steering is "
            "wanted, say so: with atv.unsteered()."
        )


class _Watched(NamedTuple):
    """Methods of a module that somebody wants to know the calls of."""

    watchers: list[tuple[Callable[[], bool], Callable[[str, Mapping[str, Any]], AbstractContextManager[Any]]]]
    former: dict[str, Any]
    """What the instance itself had under the methods' names."""


_WATCHED: dict[nn.Module, _Watched] = {}


@contextmanager
def around_methods(
    owner: nn.Module, names: Sequence[str], enter: Callable[[str, Mapping[str, Any]], AbstractContextManager[Any]]
) -> Iterator[None]:
    """Run each call of the named methods of `owner` inside the context that `enter` makes.

    Hooks see single calls of a module; what a method such as `generate` was asked for, and where one ends and the next
    begins, they do not. The methods are replaced on the instance, and put back when the last context closes.

    Args:
        owner: the module.
        names: its methods; those that it does not have are left out.
        enter: given a method's name and its arguments by name.
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
    """A method of `owner` that runs inside the contexts of those who watch it."""
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
