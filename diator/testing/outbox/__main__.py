"""
The command line of the suite.

`python -m diator.testing.outbox MODULE:HARNESS [--report FILE] [--require] [-k PATTERN] [--levels CXFS]`
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diator.testing._suite import command_line
from diator.testing.outbox._suite import SUITE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite. Return 0 if nothing failed, 1 if something failed, 2 if the arguments are wrong."""
    return command_line.run(SUITE, arguments)


if __name__ == "__main__":
    sys.exit(main())
