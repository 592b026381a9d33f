"""The process around a command: signals, the one line per error, the exit code."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from hlcli.exitcodes import ExitCode, Terminated

if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit with a code of ExitCode."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the life of the process
    signal.signal(signal.SIGTERM, _stopper(ExitCode.TERMINATED))
    signal.signal(signal.SIGINT, _stopper(ExitCode.INTERRUPTED))
    if sys.argv[1:] == ["--version"]:
        from hlcli import __version__

        print(f"hlcli {__version__}")
        sys.exit(0)
    try:
        from hlcli.cli import app

        app(prog_name="hlcli")
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException as error:
        from hlcli.cli.common import tell

        code = int(tell(error))
    _leave(code)


def _stopper(code: ExitCode) -> Any:
    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal module's form
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
        raise Terminated(code)

    return stop


def _leave(code: int) -> NoReturn:
    """Exit without waiting for threads: one may sleep for weight or hang in an answer that nobody awaits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # the reader has gone; what the run did stands, and the ledger says so
            pass
        except (OSError, ValueError):
            code = code or int(ExitCode.TEMPORARY)
    os._exit(code)


if __name__ == "__main__":
    main()
