"""The command line. Each verb is thin: it reads arguments, calls one function, and shows the record it returns."""

from __future__ import annotations

import contextlib
import sys

from bitladder.cli.ending import INTERRUPTED, Watched, open_streams, say_stopped

__all__ = ["main"]


def main() -> None:
    """Entry point of the ``bitladder`` command."""
    open_streams()
    out = Watched(sys.stdout)
    try:
        from bitladder.cli import app  # takes half a second, in which Ctrl-C may come

        app.main()
    except KeyboardInterrupt:
        say_stopped()
        sys.exit(INTERRUPTED)
    except (SystemExit, OSError) as end:
        failure = out.failure()
        if failure is None:
            raise
        code = end.code if isinstance(end, SystemExit) else 0
        if isinstance(failure, BrokenPipeError):  # the reader went away: nothing is wrong with us
            sys.exit(0 if isinstance(end.__context__, BrokenPipeError) else code)
        from bitladder.cli.terminal import show_error
        from bitladder.errors import OutputError

        error = OutputError(
            f"Standard output cannot be written: {failure.strerror}.", do="Make room, or send it elsewhere."
        )
        with contextlib.suppress(OSError):  # nor may there be room for this
            show_error(error, as_json=False)
        sys.exit(code or error.exit_code)
