"""`python -m fc_lightning COMMAND`: finds the command and turns errors into a line or two."""

from __future__ import annotations

import os
import sys

USAGE = """\
usage: python -m fc_lightning COMMAND [options]

train         fit, validate, test, predict
data          synthesize, doctor, inspect
use a model   call, evaluate, export
measure       benchmark

python -m fc_lightning COMMAND --help says more."""


def main(args: list[str] | None = None) -> None:
    """Run a command line; exits with 2 and one or two lines if something is wrong with it."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if args else 2)
    try:
        if args[0] in ("fit", "validate", "test", "predict"):
            from fc_lightning import cli

            cli.main(args)
        else:
            from fc_lightning import commands

            commands.main(args)
    except BrokenPipeError:
        # Whoever read the output (head, less) has gone; nothing is left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        # What users can mend is raised as ValueError with the words they need.
        print(f"fc_lightning {args[0]}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
