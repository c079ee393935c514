"""One command a file, each with add, which declares its arguments, and run. They see the public face only."""

from . import (
    check,
    combine,
    convert,
    evaluate,
    generate,
    info,
    init,
    inspect,
    merge,
    train,
    unmerge,
    vectors,
    verify,
)

COMMANDS = (
    *(verify, vectors),
    *(train, evaluate, generate),
    *(init, merge, unmerge, combine, convert, inspect, check),
    info,
)
