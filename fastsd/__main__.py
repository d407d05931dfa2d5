"""``python -m fastsd``: the command line."""

import sys

from fastsd.cli import main

if __name__ == "__main__":
    sys.exit(main())
