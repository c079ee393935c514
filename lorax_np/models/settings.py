"""A config.json read with care: each value checked when it is taken, and refused by its file and name."""

from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import ConfigError
from ..kinds import finite


class Settings:
    """What a config.json says, asked for one value after another."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        """Read config, of the file that errors name."""
        self.config, self.where = config, where

    def refuse(self, name: str, wanted: str, came: object) -> NoReturn:
        """Raise ConfigError: file and name, what was wanted, what came."""
        raise ConfigError(f"{self.where}: {name}: expected {wanted}, got {came!r}")

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1; null counts as missing."""
        found = self.config.get(name)
        found = default if found is None else found
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            self.refuse(name, "a whole number of at least 1", found)
        return found

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0; null counts as missing."""
        found = self.config.get(name)
        found = default if found is None else found
        if not isinstance(found, (int, float)) or not finite(found) or found <= 0:
            self.refuse(name, "a finite number above 0", found)
        return float(found)

    def flag(self, name: str, default: bool) -> bool:
        """True or False; null counts as missing."""
        found = self.config.get(name)
        found = default if found is None else found
        if not isinstance(found, bool):
            self.refuse(name, "true or false", found)
        return found

    def word(self, name: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """One of some words; null counts as missing."""
        found = self.config.get(name)
        found = default if found is None else found
        if not isinstance(found, str) or found not in allowed:
            self.refuse(name, f"one of {', '.join(allowed)}", found)
        return found

    def only(self, name: str, value: object, why: str = "") -> None:
        """Refuse anything but one value, which missing and null stand for."""
        found = self.config.get(name)
        if found is not None and (found != value or isinstance(found, bool) != isinstance(value, bool)):
            self.refuse(name, f"{value!r}{why}", found)

    def plain(self) -> None:
        """Refuse what is stored in codes, which no pass here reads."""
        found = self.config.get("quantization_config")
        if found:
            kind = found.get("quant_method", found) if isinstance(found, Mapping) else found
            self.refuse("quantization_config", "none, since weights are read as numbers", kind)
