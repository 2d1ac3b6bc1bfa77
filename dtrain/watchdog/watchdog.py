"""The watchdog as a Trainer has it: on while ``fit`` or ``evaluate`` runs."""

from dtrain.distributed import World
from dtrain.errors import ConfigError, DtrainError, RemoteError
from dtrain.watchdog.asking import are_in_a_verb, find_lost
from dtrain.watchdog.thread import Watch

HANG_AFTER_S = 300.0  # the default: a step may take this long, or ten times the slowest recent one


class Watchdog:
    """Watches this rank's main thread while it is entered, and the other ranks where it waits.

    In a world of one, or where ``hang_after_s`` (see :class:`dtrain.Trainer`) is None, there is
    nothing to watch. Raises ConfigError where that is less than a second.

    Ranks: all, local; it talks to the rendezvous store, and never to a rank.
    """

    def __init__(self, world: World, hang_after_s: float | None = HANG_AFTER_S) -> None:
        if hang_after_s is not None and not hang_after_s >= 1:
            raise ConfigError(
                f"hang_after_s={hang_after_s}: must be at least 1 second, or None for no watchdog"
            )
        self._world, self._activity = world, world.comm.activity
        self.hang_after_s = hang_after_s
        self._watch: Watch | None = None
        self._depth = 0

    def __enter__(self) -> "Watchdog":
        self._depth += 1
        if self._activity.watched:
            return self  # an evaluation inside of fit
        self._activity.restart()
        if self.hang_after_s is not None and self._world.connect is not None:
            self._activity.watched = True
            resting: list[Watch] = self._world.resting
            watch = resting.pop() if resting else None
            if watch is None or not watch.go_on(self.hang_after_s):
                watch = Watch(self._world, self.hang_after_s, self._world.connect)
                watch.start()
            told, self._watch = watch.told, watch
            self._activity.are_in_a_verb = lambda: are_in_a_verb(told, self._world)
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._depth -= 1
        if self._watch is not None and not self._depth:
            self._activity.watched = False
            self._activity.are_in_a_verb = lambda: False
            if kind is None:
                self._watch.rest()
                self._world.resting.append(self._watch)
            else:
                self._watch.stop()
            self._watch = None

    def explain(self, error: BaseException) -> DtrainError | None:
        """Returns which rank's end is why this rank lost the others, if that is what happened.

        Waits a few seconds where it takes that to see which rank posts nothing any more.
        """
        if self._watch is None or not self._world.comm.may_be_broken(error):
            return None
        failure = find_lost(self._watch.told, self._world)
        return None if failure is None else RemoteError(str(failure))
