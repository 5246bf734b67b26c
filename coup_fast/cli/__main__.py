"""`python -m coup_fast.cli` is the same command as `coup-fast`."""

import sys

from coup_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
