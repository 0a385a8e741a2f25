"""The command line of keyhole; each image that is selected is written down at once."""

import sys

from keyhole.cli.main import main
from keyhole.runs import journal

journal.WRITE_SECONDS = 0.0
sys.exit(main(sys.argv[1:]))
