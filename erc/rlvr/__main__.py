"""`python -m erc.rlvr pool`: demonstrations out of generated, verified solutions."""

from __future__ import annotations

import argparse
import sys

from erc.rlvr import pool


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m erc.rlvr", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    pool.add_arguments(commands.add_parser("pool", help="build a pool of demonstrations", description=pool.__doc__))
    try:
        pool.run(parser.parse_args(arguments))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
