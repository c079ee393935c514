"""What a layer costs, measured: engines in turn, each in a process of its own.  `python -m bench --help`."""
