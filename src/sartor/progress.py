"""Progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Mapping

UNKNOWN = 60.0  # seconds of a stage that nobody foretold
KNOWN = 0.1  # of a stage done, from which on it tells its own length
SEEN = 20.0  # foretold seconds of work done, from which on they tell the machine's pace


class Progress:
    """One line on stderr: stage, share, time left, note; a new line a stage when stderr is no terminal.

    What is left of a stage follows from what it has taken; of stages to come from what was foretold, times how much longer the work so far took than foretold. A training takes the seconds it was given, on any machine.
    """

    def __init__(
        self,
        foretold: Mapping[str, float] | None = None,
        timed: Collection[str] = (),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: foretold, timed: as for `expect`."""
        self.now, self.started, self.stage, self.shown = now, now(), "", 0.0
        self.began, self.spent = self.started, dict[str, float]()
        self.live = sys.stderr.isatty()
        self.expect(foretold or {}, timed)

    def expect(self, foretold: Mapping[str, float], timed: Collection[str]) -> None:
        """Args: foretold: seconds of every stage, in their order. timed: stages that share a purse of seconds, the sum of theirs."""
        self.foretold, self.timed = dict(foretold), timed

    def __call__(self, stage: str, share: float, note: str) -> None:
        now = self.now()
        new = stage != self.stage
        if not new and now - self.shown < (0.3 if self.live else 20):
            return
        if new:
            if self.stage:
                self.spent[self.stage] = now - self.began
            self.began = now
        self.stage, self.shown = stage, now
        gone, left = now - self.started, self.left(min(1.0, max(0.0, share)))
        time_left = f"about {max(1, round(left / 60))} min left" if self.foretold and gone > 10 else ""
        done = f"{100 * gone / max(gone + left, 1e-9):3.0f}%" if self.foretold else "    "
        line = f"{stage:9s} {done}  {time_left:18s} {note}"
        print(
            ("\r\033[K" + line[:118]) if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True
        )

    def left(self, share: float) -> float:
        """Seconds from now to the end, `share` of the stage being done."""
        here, took = self.foretold.get(self.stage, UNKNOWN), self.now() - self.began
        work = {k: s for k, s in self.spent.items() if k in self.foretold and k not in self.timed}
        done, meant = sum(work.values()), sum(self.foretold[k] for k in work)
        if self.stage not in self.timed and share > KNOWN:
            done, meant = done + took, meant + here * share
        pace = done / meant if meant > SEEN else 1.0
        now = (
            took / share * (1 - share)
            if share > KNOWN
            else max(0.0, here * (1 if self.stage in self.timed else pace) - took)
        )
        order = list(self.foretold)
        later = order[order.index(self.stage) + 1 :] if self.stage in order else []
        later = [k for k in later if k not in self.spent]
        purse = sum(self.foretold[k] for k in self.timed if k in self.foretold) - sum(
            self.spent.get(k, 0.0) for k in self.timed
        )
        if self.stage in self.timed:
            purse -= took + now
        timed = max(0.0, purse) if any(k in self.timed for k in later) else 0.0
        return now + timed + pace * sum(self.foretold[k] for k in later if k not in self.timed)

    def end(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
