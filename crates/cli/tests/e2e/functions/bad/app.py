"""Misbehaves as it is told to."""

import os
import sys
import time

calls = 0


def handler(event, context):
    global calls
    calls += 1
    match event.get("do"):
        case "raise":
            raise ValueError("no such luck")
        case "exit":
            os._exit(3)
        case "crash":
            os.abort()
        case "hang":
            time.sleep(3600)
        case "spin":
            while True:
                pass
        case "allocate":
            hoard = []
            while True:
                hoard.append(b"x" * (1 << 20))
        case "allocate in a child":
            if os.fork() == 0:
                hoard = []
                while True:
                    hoard.append(b"x" * (1 << 20))
            os.wait()
        case "fork":
            # Every process goes on forking; none ever ends by itself.
            while True:
                try:
                    os.fork()
                except OSError:
                    time.sleep(0.01)
        case "log":
            for n in range(event["lines"]):
                sys.stdout.write(f"{n:09} {'x' * 1000}\n")
            sys.stdout.write("the end of it\n")
        case "long line":
            sys.stdout.write("y" * (1 << 20) + "\n")
        case "fill":
            with open("/tmp/fill", "wb") as file:
                while True:
                    file.write(bytes(1 << 20))
        case "answer":
            return "z" * event["bytes"]
        case "unserialisable":
            return object()
    return {"calls": calls}
