#!/usr/bin/env python3
"""Times and memory of the example functions, as a Markdown table.

    measure.py [--requests N] [FUNCTION...]

Each function runs in a fresh Python process without any platform: the time to
import it (the files in the page cache), N requests of the default size, then
what the kernel says of its memory. Private memory is what no other process
can share: Private_Clean + Private_Dirty of smaps_rollup.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import reference


def memory_kib(*fields):
    with open("/proc/self/smaps_rollup") as file:
        rows = dict(line.split()[:2] for line in file.readlines()[1:])
    return sum(int(rows[field + ":"]) for field in fields)


def probe(name, requests):
    """In the process under measurement."""
    function = reference.manifest()[1][name]
    layers = [reference.DEFAULT_LAYERS / layer for layer in function["layers"]]
    started = time.perf_counter()
    handler = reference.load(reference.HERE / name, layers, function["handler"])
    import_ms = 1e3 * (time.perf_counter() - started)
    context = reference.Context(name)
    milliseconds = []
    for seed in range(requests):
        started = time.perf_counter()
        handler({"seed": seed}, context)
        milliseconds.append(1e3 * (time.perf_counter() - started))
    return {
        "import_ms": import_ms,
        "first_ms": milliseconds[0],
        "p50_ms": statistics.median(milliseconds),
        "max_ms": max(milliseconds[1:], default=milliseconds[0]),
        "rss_kib": memory_kib("Rss"),
        "private_kib": memory_kib("Private_Clean", "Private_Dirty"),
        "anonymous_kib": memory_kib("Anonymous"),
        "threads": len(os.listdir("/proc/self/task")),
    }


def main():
    environment, functions = reference.manifest()
    parser = argparse.ArgumentParser(description="Measure the example functions.")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    parser.add_argument("function", nargs="*", metavar="FUNCTION")
    arguments = parser.parse_args()
    if arguments.probe:
        print(json.dumps(probe(arguments.probe, arguments.requests)))
        return
    for name in arguments.function:
        if name not in functions:
            sys.exit(f"measure.py: no function {name}; there are {', '.join(functions)}")

    print("| function | import ms | first request ms | request ms, median | largest | RSS MiB | private MiB | anonymous MiB | threads |")
    print("| --- |" + " ---: |" * 8)
    for name in arguments.function or functions:
        command = [sys.executable, __file__, "--requests", str(arguments.requests), "--probe", name]
        run = {**environment, **os.environ, "PYTHONHASHSEED": "1"}
        subprocess.run(command, env=run, check=True, stdout=subprocess.DEVNULL)  # fills the page cache
        found = json.loads(subprocess.run(command, env=run, check=True, stdout=subprocess.PIPE).stdout)
        print(
            f"| {name} | {found['import_ms']:.0f} | {found['first_ms']:.1f} | {found['p50_ms']:.1f} "
            f"| {found['max_ms']:.1f} | {found['rss_kib'] / 1024:.1f} | {found['private_kib'] / 1024:.1f} "
            f"| {found['anonymous_kib'] / 1024:.1f} | {found['threads']} |"
        )


if __name__ == "__main__":
    main()
