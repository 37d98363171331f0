"""The example functions answer the same whoever asks: run with `python3 -m unittest`.

Needs the layers of this Python version (scripts/build-layers).
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

import reference

ENVIRONMENT, FUNCTIONS = reference.manifest()
SEEDS = (1, 2, 3)


def answers(name, events, hash_seed, home):
    """What a fresh process answers to events, in order."""
    run = subprocess.run(
        [sys.executable, str(reference.HERE / "reference.py"), str(reference.HERE / name)],
        input="".join(json.dumps(event) + "\n" for event in events),
        capture_output=True,
        text=True,
        env={
            "PATH": os.environ["PATH"],
            "HOME": home,
            "TMPDIR": home,
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": str(hash_seed),
        },
    )
    if run.returncode != 0:
        raise AssertionError(f"{name} ended with status {run.returncode}:\n{run.stderr}")
    return [json.loads(line) for line in run.stdout.splitlines()]


class Manifest(unittest.TestCase):
    def test_every_function_is_described(self):
        directories = {path.parent.name for path in reference.HERE.glob("*/app.py")}
        self.assertEqual(directories, set(FUNCTIONS))
        for name, function in FUNCTIONS.items():
            with self.subTest(name):
                for layer in function["layers"]:
                    self.assertTrue((reference.HERE / "layers" / layer / "requirements.txt").is_file())
                self.assertTrue(function["events"])
                self.assertTrue(all("seed" in event for event in function["events"]))

    def test_four_are_small(self):
        small = {name for name, function in FUNCTIONS.items() if function["small"]}
        self.assertEqual(small, {"vanilla", "linalg", "htmlserve", "imagepro"})


class Functions(unittest.TestCase):
    """One test for each function, added below."""

    def check(self, name):
        events = [{"seed": seed} for seed in SEEDS] + FUNCTIONS[name]["events"]
        with tempfile.TemporaryDirectory() as home:
            first = answers(name, events, 1, home)
            # Another hash seed and another order: neither the layout of the
            # process nor what it was asked before may show.
            second = answers(name, events[::-1], 2, home)[::-1]
            left_behind = list(pathlib.Path(home).iterdir())
        self.assertEqual(first, second)
        for event, answer in zip(events, first, strict=True):
            self.assertNotIn("errorType", answer, f"{name} answered {event} with {answer}")
        by_seed = {json.dumps(answer, sort_keys=True) for answer in first[: len(SEEDS)]}
        self.assertEqual(len(by_seed), len(SEEDS), "different seeds gave one answer")
        self.assertEqual(left_behind, [])

    def check_refusal(self, name):
        with tempfile.TemporaryDirectory() as home:
            refused, good = answers(name, [{"seed": 1, "size": 0}, {"seed": 1}], 1, home)
        self.assertEqual(refused["errorType"], "ValueError")
        self.assertIn("size must be", refused["errorMessage"])
        self.assertNotIn("errorType", good)


for _name in FUNCTIONS:
    setattr(Functions, f"test_{_name}", lambda self, name=_name: self.check(name))
    setattr(Functions, f"test_{_name}_bad_size", lambda self, name=_name: self.check_refusal(name))


if __name__ == "__main__":
    unittest.main()
