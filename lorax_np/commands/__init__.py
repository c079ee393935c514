"""One command a file, each with add, which declares its arguments, and run. They see the public face only."""

from . import check, info, vectors, verify

COMMANDS = verify, vectors, check, info
