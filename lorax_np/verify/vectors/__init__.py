"""Golden vectors, for implementations in any language.  Format: specs/vectors.md."""
