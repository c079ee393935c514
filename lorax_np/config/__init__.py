"""What an adapter is: LoraConfig in PEFT's names, and Site, its resolved numbers at one name."""

from .fields import STARTS, start_name
from .lora import DEFAULTS, FIELDS, OURS, TIERS, LoraConfig, check_usable
from .plan import Plan
from .settings import settings_of
from .site import Site, site_at

__all__ = [
    "DEFAULTS",
    "FIELDS",
    "OURS",
    "STARTS",
    "TIERS",
    "LoraConfig",
    "Plan",
    "Site",
    "check_usable",
    "settings_of",
    "site_at",
    "start_name",
]
