"""Time, as the state machine knows it: what `tick` said last, and who waits for which moment."""

from dax_mp.transaction import Completion, Scheduler


class Timers:
    """now_s: of a clock that never goes back, in seconds."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._waiting: list[tuple[float, Completion]] = []
        self.now_s = 0.0

    def at(self, moment_s: float) -> Completion:
        """Done at that moment, or before, where somebody else completes it."""
        completion = Completion(self._scheduler)
        self._waiting.append((moment_s, completion))
        return completion

    def tick(self, now_s: float) -> None:
        """It is `now_s`: whoever waits for a moment that has come goes on."""
        self.now_s = now_s
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        for moment_s, completion in waiting:
            if completion.done:
                continue
            if moment_s <= now_s:
                completion.complete()
            else:
                self._waiting.append((moment_s, completion))

    def next_s(self) -> float | None:
        """The next moment that somebody waits for."""
        return min((moment_s for moment_s, completion in self._waiting if not completion.done), default=None)
