"""`python -m keyhole` is `keyhole`."""

import sys

from keyhole.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
