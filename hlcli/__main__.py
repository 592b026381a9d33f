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

LOOK_AGAIN_S = 0.01
_leaving = False


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
    global _leaving  # noqa: PLW0603 - a process leaves once
    ended: BaseException = SystemExit(0)
    try:
        from hlcli.cli import app

        app(prog_name="hlcli")
    except BaseException as error:
        _leaving = True
        ended = error
    _leave(_code(ended))


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
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)  # a second signal ends the process at once
        if _may_raise(frame):
            exitcodes.stop(code)
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, LOOK_AGAIN_S)

    return stop


def _may_raise(frame: FrameType | None) -> bool:
    """Whether the code that a signal interrupted can take an exception out of nowhere.

    Polars panics when Python that it calls raises, and good content would pass for bad. Psycopg cancels the statement
    that it waits for; anywhere else within it the connection would be left in disorder.
    """
    if _leaving or exitcodes.is_undisturbed():
        return False
    stack = []
    while frame is not None:
        stack.append((str(frame.f_globals.get("__name__", "")), frame.f_code.co_name))
        frame = frame.f_back
    packages = [module.partition(".")[0] for module, _ in stack]
    if packages[:1] == ["contextlib"] or "polars" in packages:
        return False
    waits = [("psycopg.connection", "wait"), ("psycopg.cursor", "execute")]
    return "psycopg" not in packages or stack[:2] == waits


def _code(ended: BaseException) -> int:
    """The exit code for what ended the command; what is no plain exit is told."""
    if isinstance(ended, SystemExit):
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    from hlcli.cli.common import tell

    return int(tell(ended))


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
