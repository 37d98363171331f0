#!/usr/bin/env python3
"""Answers of an example function without any platform: the oracle.

    reference.py FUNCTION_DIR [--layer DIR]... [--handler MODULE.NAME] < events > answers

Reads one JSON event per line, calls the handler in this process and writes
one JSON line per event: the answer, or {"errorMessage": ..., "errorType": ...}
as Lambda's runtime interface client words a handler's exception. On the same
machine with the same layers a sandbox must give equal JSON.

Without --layer, the layers that functions.toml names are taken from
.cache/layers/<Python version>, where scripts/build-layers puts them. The
environment in functions.toml applies, below what the caller has set.
"""

import argparse
import importlib
import json
import os
import pathlib
import sys
import tomllib

HERE = pathlib.Path(__file__).resolve().parent
VERSION = "%d.%d" % sys.version_info[:2]
DEFAULT_LAYERS = HERE.parents[1] / ".cache" / "layers" / VERSION


class Context:
    """What handlers may read of Lambda's context object."""

    aws_request_id = "00000000-0000-0000-0000-000000000000"
    function_version = "$LATEST"
    memory_limit_in_mb = "256"

    def __init__(self, name):
        self.function_name = name
        self.invoked_function_arn = f"arn:aws:lambda:us-east-1:000000000000:function:{name}"

    def get_remaining_time_in_millis(self):
        return 30_000


def manifest():
    """functions.toml: the shared environment, and each function by its name."""
    with open(HERE / "functions.toml", "rb") as file:
        data = tomllib.load(file)
    return data["environment"], {function["name"]: function for function in data["function"]}


def load(directory, layers, handler):
    """The handler, found as in Lambda: task root first, then the layers."""
    paths = [str(directory)] + [str(pathlib.Path(layer).resolve() / "python") for layer in layers]
    for path in paths:
        if not os.path.isdir(path):
            sys.exit(f"reference.py: no directory {path}; build the layers with scripts/build-layers")
    sys.path[0:1] = paths  # in place of this script's own directory
    module, _, name = handler.rpartition(".")
    return getattr(importlib.import_module(module), name)


def main():
    parser = argparse.ArgumentParser(description="Call a Lambda handler in this process.")
    parser.add_argument("function", type=pathlib.Path, metavar="FUNCTION_DIR")
    parser.add_argument("--layer", action="append", metavar="DIR", help="holds python/; repeatable")
    parser.add_argument("--handler", help="default: functions.toml, else app.handler")
    arguments = parser.parse_args()

    directory = arguments.function.resolve()
    environment, functions = manifest()
    function = functions.get(directory.name, {})
    layers = arguments.layer
    if layers is None:
        layers = [DEFAULT_LAYERS / layer for layer in function.get("layers", [])]
    # Before any import of a library, which reads these once.
    for name, value in environment.items():
        os.environ.setdefault(name, value)

    handler = load(directory, layers, arguments.handler or function.get("handler", "app.handler"))
    # Handlers may print; answers have the standard output to themselves.
    answers, sys.stdout = sys.stdout, sys.stderr
    context = Context(directory.name)
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            answer = handler(json.loads(line), context)
        except Exception as error:
            answer = {"errorMessage": str(error), "errorType": type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
