"""The harness within pytest."""
