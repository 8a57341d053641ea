"""Ctrl-C waits for the end of a step, so that factors, moments and counters agree whenever a program is stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Postponed:
    """Signals with a Python handler, kept back from :meth:`begin` to :meth:`end`, which delivers them.

    Args:
        running: whether the step is still under way, seen from the frame that was interrupted. Where it is not, since
            the step raised and ``end`` was never reached, a signal is delivered at once and the handlers are put back.
    """

    def __init__(self, running: Callable[[FrameType | None], bool]) -> None:
        self._running = running
        self._handlers: dict[int, Any] = {}  # those that were there before
        self._in_force = False
        self._came: list[int] = []

    def begin(self) -> None:
        """Does nothing outside the main thread, which alone is interrupted."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._in_force = True
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and handler != self._receive:
                self._handlers[number] = handler
                signal.signal(number, self._receive)

    def end(self) -> None:
        """Put the handlers back, then deliver what came, once each: to another step's that began later, if there is."""
        if not self._in_force:
            return
        self._in_force = False
        came, self._came = self._came, []
        self._put_back()
        for number in dict.fromkeys(came):
            handler = signal.getsignal(number)
            if callable(handler):
                handler(number, None)

    def _put_back(self) -> None:
        for number in list(self._handlers):
            if signal.getsignal(number) == self._receive:  # else somebody has set another one since
                signal.signal(number, self._before(number))

    def _before(self, number: int) -> Any:
        """The handler that was there, past those of steps that have ended since."""
        handler = self._handlers.pop(number)
        while isinstance(owner := getattr(handler, "__self__", None), Postponed) and not owner._in_force:
            handler = owner._handlers.pop(number)
        return handler

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._in_force and self._running(frame):
            self._came.append(number)
            return
        self._in_force = False
        on_top = signal.getsignal(number) == self._receive
        handler = self._before(number) if on_top else self._handlers[number]
        if on_top:
            signal.signal(number, handler)
        handler(number, frame)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C waits for the end."""
    postponed = Postponed(lambda frame: True)
    postponed.begin()
    try:
        yield
    finally:
        postponed.end()
