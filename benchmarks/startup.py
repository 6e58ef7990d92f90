"""Start-up cost: processor time of `import elakit` and `elakit --help`, compared with NumPy and a small command line.

``python -m benchmarks.startup`` starts each command several times in turn and prints medians of the processor time
(user and system) and the two ratios: at most 3 for the import, at most 2 for the help.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from elakit.cli_options import without_markup

SMALL = """
import typer

app = typer.Typer()


@app.command()
def greet(name: str = "world") -> None:
    "Greet somebody."


@app.command()
def count(number: int = 3) -> None:
    "Count to a number."


app()
"""


def processor_time(command: list[str]) -> float:
    """Processor time of a command in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def main() -> None:
    """Print medians of the processor times, and the two ratios."""
    parser = argparse.ArgumentParser(description=without_markup(__doc__))
    parser.add_argument("--repeats", type=int, default=7, help="number of starts of each command")
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder, "small.py")
        small.write_text(SMALL, encoding="utf-8")
        commands = {
            "import numpy": [sys.executable, "-c", "import numpy"],
            "import elakit": [sys.executable, "-c", "import elakit"],
            "small typer app --help": [sys.executable, str(small), "--help"],
            "elakit --help": [sys.executable, "-m", "elakit", "--help"],
        }
        for command in commands.values():
            processor_time(command)  # writes compiled files
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(repeats):
            for name, command in commands.items():
                times[name].append(processor_time(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print("| command | processor time |\n| --- | --- |")
    for name, seconds in medians.items():
        print(f"| `{name}` | {seconds:.3f} s |")
    print(f"\nimport elakit / import numpy: {medians['import elakit'] / medians['import numpy']:.2f} (at most 3)")
    print(
        f"elakit --help / small --help: {medians['elakit --help'] / medians['small typer app --help']:.2f} (at most 2)"
    )


if __name__ == "__main__":
    main()
