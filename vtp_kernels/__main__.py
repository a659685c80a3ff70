"""`python -m vtp_kernels`: the command line."""

import sys

from vtp_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
