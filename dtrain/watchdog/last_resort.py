"""What needs no interpreter: the stacks of a process that is aborted, and a timer that ends it."""

import faulthandler
import math

#: Where no other rank is left that could end it: a process whose interpreter is held for so many
#: times its limit ends itself. (Another clock does not run then, so it counts a stop as well.)
_TIMES = 10
_ARM_EVERY_S = 30.0


class Stacks:
    """Has an aborted process write its stacks, as others may abort it. Ranks: all, local."""

    def __init__(self) -> None:
        self._shown = False  # by this, and not by the script itself

    def show(self) -> None:
        """From here on."""
        if not faulthandler.is_enabled():
            faulthandler.enable(file=2)
            self._shown = True

    def hide(self) -> None:
        """No longer, unless the script wants it."""
        if self._shown:
            self._shown = False
            faulthandler.disable()


class Timer:
    """Ends the process, by code in C, should the watchdog never run again. Ranks: all, local."""

    def __init__(self) -> None:
        self._armed_at = -math.inf

    def arm(self, limit_s: float, now: float) -> None:
        """Sets it, if that is due; or takes it back, where a rank may stay for ever."""
        if math.isinf(limit_s):
            self.disarm()
        elif now - self._armed_at > _ARM_EVERY_S:
            self._armed_at = now
            faulthandler.dump_traceback_later(_TIMES * limit_s, exit=True, file=2)

    def disarm(self) -> None:
        """Takes it back."""
        faulthandler.cancel_dump_traceback_later()
        self._armed_at = -math.inf
