"""Progress on stderr."""

from __future__ import annotations

import sys
import time


class Progress:
    """One line on stderr: stage, share, time left, note; a new line a stage when stderr is no terminal."""

    ORDER = {
        "open": (0.0, 0.02),
        "view": (0.02, 0.05),
        "probe": (0.02, 0.10),
        "explain": (0.4, 1.0),
        "decide": (0.10, 0.15),
        "adapt": (0.15, 0.42),
        "prune": (0.42, 0.47),
        "fit": (0.47, 0.52),
        "recover": (0.52, 0.80),
        "export": (0.80, 0.82),
        "measure": (0.82, 0.9),
        "controls": (0.9, 1.0),
    }

    def __init__(self) -> None:
        self.started, self.stage, self.shown = time.monotonic(), "", 0.0
        self.live = sys.stderr.isatty()

    def __call__(self, stage: str, share: float, note: str) -> None:
        now = time.monotonic()
        new = stage != self.stage
        if not new and now - self.shown < (0.3 if self.live else 20):
            return
        self.stage, self.shown = stage, now
        low, high = self.ORDER.get(stage, (0.0, 1.0))
        done = low + (high - low) * min(1.0, max(0.0, share))
        gone = now - self.started
        left = f"about {max(1, round(gone / done * (1 - done) / 60))} min left" if done > 0.05 and gone > 10 else ""
        line = f"{stage:9s} {100 * done:3.0f}%  {left:18s} {note}"
        print(
            ("\r\033[K" + line[:118]) if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True
        )

    def end(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
