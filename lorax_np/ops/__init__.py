"""The derivations, one a file: each forward beside its adjoint, numbered as in specs/."""
