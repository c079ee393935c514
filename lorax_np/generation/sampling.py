"""Which token is written, of the logits of all: the likeliest, or a seeded draw.  specs/generation.md."""

from dataclasses import dataclass

import numpy as np

from ..backend import HostArray, quiet
from ..errors import ConfigError
from ..kinds import finite
from ..random import philox, site_key, word

KEY = site_key("generation")  # beside the seed, so that draws are none of those of dropout masks


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    temperature : 0 takes the likeliest; else logits are divided by it, and a token is drawn
    top_k       : only the k likeliest can be drawn; 0 for all
    top_p       : of those only the likeliest that together reach this probability
    seed        : the draw's; the same seed gives the same text
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError for a number that has no meaning."""
        if not finite(self.temperature) or self.temperature < 0:
            raise ConfigError(f"temperature: expected a number of at least 0, got {self.temperature!r}")
        if not finite(self.top_p) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected a number above 0 and at most 1, got {self.top_p!r}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ConfigError(f"top_k: expected how many tokens, 0 for all, got {self.top_k!r}")
        word("seed", self.seed)


def choose(z: HostArray, how: Sampling, t: int) -> int:
    """The id of the token that is written in place t, counted from 0 behind the prompt.

    z : (V,)   logits, finite

    >>> choose(np.array([0.0, 2.0, 2.0]), Sampling(), 0)
    1
    """
    if how.temperature == 0:
        return int(z.argmax())  # (generation.3), the first of equals
    p = probabilities(z, how)
    up_to = np.cumsum(p)
    i = int(np.searchsorted(up_to, draw(how.seed, t) * up_to[-1], side="right"))  # (generation.8)
    return min(i, int(p.nonzero()[0][-1]))  # a product may round up to the sum itself


def probabilities(z: HostArray, how: Sampling) -> HostArray:
    """What each token is drawn with : (V,) float64, 0 for those that cannot be; temperature > 0.

    >>> z = np.log(np.array([0.5, 0.125, 0.375]))
    >>> probabilities(z, Sampling(temperature=1.0, top_p=0.6)).round(3).tolist()
    [0.571, 0.0, 0.429]
    """
    wide = np.asarray(z, dtype=np.float64)
    with quiet():  # a small temperature: differences that are −∞
        e: HostArray = np.exp((wide - wide.max()) / how.temperature)
    p = e / e.sum()  # (V,)  (generation.4)
    falling = np.argsort(-p, kind="stable")  # likeliest first, of equals the lowest id
    if how.top_k:
        p[falling[how.top_k :]] = 0.0  # (generation.5)
    if how.top_p < 1:
        before = np.cumsum(p[falling]) - p[falling]
        p[falling[before >= how.top_p * p.sum()]] = 0.0  # (generation.6)
    found: HostArray = p / p.sum()
    return found


def draw(seed: int, t: int) -> float:
    """A number from 0 to below 1, of its arguments alone: 53 bits of a word of Philox.  (generation.7)

    >>> draw(0, 0) == draw(0, 0), draw(0, 0) != draw(0, 1), draw(0, 0) != draw(1, 0)
    (True, True, True)
    """
    counter = [np.array([n], dtype=np.uint64) for n in (t, 0, 0, 0)]
    return float(philox(counter, (seed, KEY))[0][0] >> np.uint64(11)) * 2.0**-53
