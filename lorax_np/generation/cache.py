"""Keys and values of the tokens so far, kept so that each is computed once.  specs/generation.md."""

from typing import Any

from ..backend import Array, namespace_of
from ..errors import ShapeError

FIRST = 64  # rows that are made room for at once; then twice as many, and so on


class Cache:
    """Keys and values of every block, of one text's tokens. The only record here that is written to.

    count : how many tokens have been seen by all blocks
    """

    def __init__(self) -> None:
        """Start with no token."""
        self.count = 0
        self._held: dict[int, list[Any]] = {}  # by block: k, v : (room, K, D)

    def extend(self, block: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Put keys and values of new tokens, k : (n, K, D), v : (n, K, E), behind a block's; give all of them.

        How many there were is counted by advance, so that every block of a pass finds the same.  (generation.2)
        """
        stop = self.count + k.shape[0]
        if block not in self._held:
            self._held[block] = [_room(x, max(FIRST, stop)) for x in (k, v)]
        held = self._held[block]
        for i, new in enumerate((k, v)):
            if held[i].shape[0] < stop:
                wider = _room(held[i], max(2 * held[i].shape[0], stop))
                wider[: self.count, ...] = held[i][: self.count, ...]
                held[i] = wider
            if held[i].shape[1:] != new.shape[1:]:
                raise ShapeError(f"k, v: expected rows {held[i].shape[1:]}, as before, got {new.shape[1:]}")
            held[i][self.count : stop, ...] = new
        return held[0][:stop, ...], held[1][:stop, ...]

    def advance(self, new: int) -> None:
        """Count the tokens that every block has seen now."""
        self.count += new


def _room(like: Any, rows: int) -> Any:
    """Rows like those of an array, to be written to."""
    xp = namespace_of(like=like)
    return xp.zeros((rows, *like.shape[1:]), dtype=like.dtype)
