"""The fxc command's entry. It imports next to nothing, so that Ctrl-C is handled before the long imports begin."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line; an interruption at any moment is one line on stderr, or with --json one JSON object on stdout, and
    exit code 130."""
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        from fxc.cli.app import app

        app(prog_name="fxc")
    except SystemExit:
        # Click makes exit code 1 of an interruption outside a command, and prints its own line.
        if interrupted:
            sys.exit(130)
        raise
    except BaseException:
        # An import that is interrupted may end in another error than KeyboardInterrupt.
        if not interrupted:
            raise
        if "--json" in sys.argv:
            print('{"error": {"kind": "Interrupted"}}')
        else:
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        # What runs at the interpreter's exit has no handler above it.
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))


if __name__ == "__main__":
    main()
