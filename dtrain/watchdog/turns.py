"""Whether the main thread is in a fit, as the watchdog's thread is told."""

import threading
from collections.abc import Callable
from typing import Literal


class Turns:
    """A fit, a rest in which another one may begin, and the end, after which none may.

    Ranks: all, local.
    """

    def __init__(self) -> None:
        self._state: Literal["fit", "rest", "stop", "over"] = "fit"
        self._told = threading.Condition()  # guards it

    # What the main thread tells.

    def rest(self) -> None:
        """The fit has ended, and another one may begin."""
        self._turn("rest")

    def stop(self) -> None:
        """The fit, or the rest after it, has ended, and none may begin."""
        self._turn("stop")

    def go_on(self, prepare: Callable[[], None]) -> bool:
        """Another fit begins, for which all is made ready; returns False where it is too late."""
        with self._told:
            if self._state != "rest":
                return False
            prepare()
            self._state = "fit"
            self._told.notify_all()
            return True

    def _turn(self, state: Literal["rest", "stop"]) -> None:
        with self._told:
            if self._state != "over":
                self._state = state
            self._told.notify_all()

    # What the watchdog's thread asks.

    def fit_ends(self, within_s: float) -> bool:
        """Waits so long for the end of a fit; says whether that has come."""
        with self._told:
            return self._told.wait_for(lambda: self._state != "fit", within_s)

    def another_begins(self, within_s: float) -> bool:
        """Waits so long for another fit; says whether that has begun. If not, none may."""
        with self._told:
            self._told.wait_for(lambda: self._state != "rest", within_s)
            if self._state != "fit":
                self._state = "over"
            return self._state == "fit"
