"""`python -m first_trl` and `accelerate launch -m first_trl`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
