"""python -m lorax_np is lorax-np."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
