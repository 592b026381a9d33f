"""The process around a command: signals, the one line per error, the exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from hlcli import exitcodes
from hlcli.exitcodes import ExitCode

if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit with a code of ExitCode."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the life of the process
        else:
            _outlive_readers(getattr(sys, name))
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


class _Pipe(io.FileIO):
    """A file that takes what nobody reads any more: `| head` is no failure of the command."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def _outlive_readers(stream: Any) -> None:
    """Put a _Pipe under stdout or stderr, with everything else as it was."""
    setattr(
        sys,
        stream.name.strip("<>"),
        io.TextIOWrapper(
            io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False)),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering or stream.write_through,
            write_through=stream.write_through,
        ),
    )


def _stopper(code: ExitCode) -> Any:
    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal module's form
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
        exitcodes.stop(code)

    return stop


def _leave(code: int) -> NoReturn:
    """Exit without waiting for threads: one may sleep for weight or hang in an answer that nobody awaits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or int(ExitCode.TEMPORARY)
    os._exit(code)


if __name__ == "__main__":
    main()
