"""Ctrl-C and SIGTERM: the first lets the step finish, the second ends the run at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = signal.SIGINT, signal.SIGTERM
WORDS = b"\nstopping after this step, which is then saved; once more stops at once\n"


class Stop:
    """Within its block, whether somebody has asked to stop. In threads other than the main one nobody can."""

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Take the signals over."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, WORDS)  # as it is: in the middle of a line that is being printed nothing else may be
