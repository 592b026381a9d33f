"""How long `hlcli --version` and `hlcli --help` take beside `import typer` and the help of a two-command Typer app.

python -m tests.bench.startup [--rounds 10]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TWO_COMMANDS = """
import typer
app = typer.Typer()
@app.command()
def one(count: int = 1) -> None:
    "Do one thing."
@app.command()
def two(name: str = "x") -> None:
    "Do another."
app()
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        two = Path(folder, "two.py")
        two.write_text(TWO_COMMANDS)
        pairs = {
            "hlcli --version": (["-m", "hlcli", "--version"], ["-c", "import typer"]),
            "hlcli --help": (["-m", "hlcli", "--help"], [str(two), "--help"]),
        }
        for name, (ours, theirs) in pairs.items():
            best = [min(_seconds(arguments) for _ in range(rounds)) for arguments in (ours, theirs)]
            print(
                f"{name:16s} {best[0]:.3f} s   {best[0] / best[1]:.2f} of {theirs[-1]!r} in {best[1]:.3f} s"
            )


def _seconds(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
