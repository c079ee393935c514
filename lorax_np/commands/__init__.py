"""One command a file, each with add, which declares its arguments, and run. They see the public face only."""

from . import check, info, inspect, vectors, verify

COMMANDS = verify, vectors, check, inspect, info
