"""A process that ends at a call, played within a test: from then on nothing that changes the disk is done."""

import os
from contextlib import contextmanager
from unittest import mock

CALLS = "rename", "replace", "mkdir", "rmdir", "unlink", "fsync", "open"


class Killed(BaseException):
    """Raised by every call after the process has ended."""


@contextmanager
def dying(k):
    """Within this block the k-th call that would change the disk is not done any more, nor any after it.

    Yields a list that holds one entry once that has happened.
    """
    killed, count = [], [0]

    def last(plain):
        def call(path, *arguments, **more):
            flags = arguments[0] if arguments else more.get("flags", 0)
            if plain is PLAIN["open"] and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return plain(path, *arguments, **more)
            if killed:
                raise Killed
            count[0] += 1
            if count[0] == k:
                killed.append(k)
                raise Killed
            return plain(path, *arguments, **more)

        return call

    patches = [mock.patch.object(os, name, last(PLAIN[name])) for name in CALLS]
    for patch in patches:
        patch.start()
    try:
        yield killed
    except Killed:
        pass
    finally:
        for patch in patches:
            patch.stop()


PLAIN = {name: getattr(os, name) for name in CALLS}
