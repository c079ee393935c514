"""Ctrl-C, SIGTERM and a hang-up: the first lets the step finish, a second ends the run at once."""

import os
import signal
import stat
import threading
from types import FrameType, TracebackType
from typing import Any, Self

HANGUP = getattr(signal, "SIGHUP", None)  # which Windows lacks
SIGNALS = signal.SIGINT, signal.SIGTERM, *([] if HANGUP is None else [HANGUP])
WORDS = b"\nstopping after this step, which is then saved; once more stops at once\n"


class Stop:
    """Within its block, whether somebody has asked to stop. In threads other than the main one nobody can."""

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Take the signals over; but a hang-up that is ignored, as under nohup, stays so."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == HANGUP:  # of one terminal that closes shell and system may both tell
            return
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        try:
            os.write(2, WORDS)  # as it is: in the middle of a line that is being printed nothing else may be
        except OSError:
            _to_nobody()


def _to_nobody() -> None:
    """Have what is still to be said go nowhere, where it would go to a terminal that is no more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        if stat.S_ISCHR(os.fstat(number).st_mode):
            os.dup2(nowhere, number)
    os.close(nowhere)
