"""Every speed and memory figure of the project, from one command:

    python -m tests.benchmarks [--only coupling tracking …] [--json results.json] [--card model_cards/benchmarks.md]

Each entry is a command of one benchmark file, run by itself on one thread; what it compares runs in turn in one process
there (see the file's own docstring). The JSON file holds the figures of every line. The card is written anew from the
results, with the machine and the versions; so that entries can be measured one by one, results already in the JSON file
are kept.
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from trainers.files import json_text, write_text

from .measuring import RECORDS

ROOT = Path(__file__).resolve().parents[2]
TITLES = {
    "coupling": "Knowledge coupling",
    "connection_transformer": "Connection Transformer",
    "continuous_thought_machine": "Continuous Thought Machine",
    "in_context_transformer": "In-context Transformer",
    "memory": "Checkpointing and half precision",
    "tracking": "Internals tracking",
    "kernels": "Attention kernels of the Vanilla Transformer",
}
JOBS: dict[str, list[str]] = {
    "coupling gpt2": ["tests.benchmarks.bench_coupling", "--model", "gpt2"],
    "coupling gpt2, last four layers": ["tests.benchmarks.bench_coupling", "--model", "gpt2", "--layers", "last-4"],
    "coupling llama": ["tests.benchmarks.bench_coupling", "--model", "llama", "--skip_memory"],
    "coupling growth": ["tests.benchmarks.bench_coupling", "--model", "tiny", "--growth"],
    "connection_transformer": ["tests.benchmarks.bench_connection_transformer"],
    "continuous_thought_machine": ["tests.benchmarks.bench_continuous_thought_machine"],
    "in_context_transformer": ["tests.benchmarks.bench_in_context_transformer"],
    "memory": ["tests.benchmarks.bench_memory"],
    "tracking": ["tests.benchmarks.bench_tracking", "--batch", "8", "--rounds", "5"],
    "tracking memory": ["tests.benchmarks.bench_tracking", "--memory"],
    "kernels": ["trainers.trace", "--compare", "eager", "sdpa", "torch"],
}


def machine() -> dict[str, str]:
    """What the figures depend on besides the code."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return {
        "processor": f"{name}, {os.cpu_count()} cores, one thread used",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def run(name: str) -> dict[str, Any]:
    """Run one entry. Returns its command, output, figures, seconds, date, load and machine.

    Raises:
        RuntimeError: with the end of what it wrote, if it fails.
    """
    command = JOBS[name]
    started, load = time.perf_counter(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder, "records.jsonl")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), RECORDS: str(records)}
        result = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        lines = records.read_text(encoding="utf-8").splitlines() if records.exists() else []
    if result.returncode != 0:
        raise RuntimeError(f"{name} failed with exit code {result.returncode}: {result.stderr.strip()[-2000:]}")
    return {
        "command": shlex.join(["python", "-m", *command]),
        "output": result.stdout.rstrip(),
        "figures": [json.loads(line) for line in lines],
        "seconds": round(time.perf_counter() - started),
        "date": date.today().isoformat(),
        "load_at_start": round(load, 1),
        "machine": machine(),
    }


def card(results: dict[str, dict[str, Any]]) -> str:
    """The page of all results, in the order of `JOBS`."""
    parts = [
        "# Speed and memory",
        "Written by `python -m tests.benchmarks --card model_cards/benchmarks.md`. Every comparison runs its forms in "
        "turn in one process on one thread; times are medians of CPU seconds, so that other work on the machine "
        "disturbs them little; ratios are those of the medians, with the least and most of a round. A slope is the "
        "power of the size with which the time grows. What the forms are stands in the docstring of each file. Bars "
        "and what was tried stand on the card of each architecture.",
    ]
    title = None
    for name in JOBS:
        if name not in results:
            continue
        entry = results[name]
        if TITLES[name.split()[0]] != title:
            title = TITLES[name.split()[0]]
            parts.append(f"## {title}")
        on = entry["machine"]
        parts.append(f"`{entry['command']}`")
        if entry["figures"]:
            # What belongs to the line above it is indented.
            parts.append("\n".join(re.sub(r"^( *)", r"\1- ", line) for line in entry["output"].splitlines()))
        else:
            parts.append(f"```text\n{entry['output']}\n```")
        parts.append(
            f"{entry['date']}; {on['processor']}; Python {on['python']}, torch {on['torch']}, transformers "
            f"{on['transformers']}; {entry['seconds']} s, load {entry['load_at_start']} at the start."
        )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only",
        nargs="*",
        metavar="NAME",
        help=f"entries by name or its beginning: {', '.join(JOBS)}; none to measure nothing and draw the page again",
    )
    parser.add_argument("--json", type=Path, help="file that results are added to")
    parser.add_argument("--card", type=Path, help="Markdown page drawn from the results")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.only or [] if not any(job.startswith(name) for job in JOBS)]
    if unknown:
        parser.error(f"unknown entry {unknown[0]!r}; known: {', '.join(JOBS)}")
    results = {}
    if arguments.json and arguments.json.exists():
        results = json.loads(arguments.json.read_text(encoding="utf-8"))
    for name in JOBS:
        if arguments.only is not None and not any(name.startswith(wanted) for wanted in arguments.only):
            continue
        print(f"{name}: {shlex.join(['python', '-m', *JOBS[name]])}", flush=True)
        results[name] = run(name)
        print(results[name]["output"], flush=True)
        if arguments.json:
            write_text(arguments.json, json_text(results))
    if arguments.card:
        write_text(arguments.card, card(results))


if __name__ == "__main__":
    main()
