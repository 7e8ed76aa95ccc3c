"""The command `lalm-lens`. What takes seconds to import is imported by the command that needs it."""

import sys

from typer.exceptions import TyperException

from lalm_lens.commands import audiolens, av, check, conflict, report, reproduce, run, spec, trace
from lalm_lens.commands.base import app
from lalm_lens.errors import LensError

COMMANDS = trace, audiolens, conflict, av, run, reproduce, spec, report, check  # in the order of the help


def main() -> None:
    """Run the command line; what a user can mend ends in one line and exit code 2."""
    try:
        sys.exit(app(prog_name="lalm-lens", standalone_mode=False))
    except TyperException as error:
        line = usage(error)
    except (LensError, OSError) as error:  # OSError: a full disk, a folder that has gone
        line = str(error)
    if line:
        print(f"lalm-lens: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(2)


def usage(error: TyperException) -> str:
    """What was wrong with the arguments. Nothing, if there were none: then the help has been shown."""
    message, context = error.format_message().rstrip("."), getattr(error, "ctx", None)
    end = "" if message.endswith("?") else "."
    return f"{message}{end} See {context.command_path} --help." if message and context else message
