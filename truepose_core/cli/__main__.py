"""`python -m truepose_core.cli`, also for `accelerate launch -m truepose_core.cli train`."""

import sys

from truepose_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
