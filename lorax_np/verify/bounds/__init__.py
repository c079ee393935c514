"""How far from the truth roundings carry a right implementation: at worst, usually, and together."""
