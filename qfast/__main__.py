"""`python -m qfast` is the command `qfast`, for environments whose scripts are not on the PATH."""

import sys

from qfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
