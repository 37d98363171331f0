"""State in memory alone: a counter, a large array, many small objects."""

import gc
import hashlib
import os
import random
import time

SIZE = 8 << 20
PAGE = 4096

calls = 0
# Random, so that no two sandboxes share a page of it and no compressor gets anything out of it.
array = bytearray(os.urandom(SIZE))
digest = hashlib.sha256(array).hexdigest()
objects = {i: (str(i), [i, float(i)], {"square": i * i}) for i in range(20_000)}


def objects_are_intact():
    return all(
        text == str(i) and numbers == [i, float(i)] and more == {"square": i * i}
        for i, (text, numbers, more) in objects.items()
    )


def handler(event, context):
    global calls, digest
    calls += 1
    found = hashlib.sha256(array).hexdigest()
    intact = found == digest and objects_are_intact()
    # Some pages change, some objects are replaced, some memory goes back to the system.
    rng = random.Random(event["seed"])
    for _ in range(event.get("pages", 16)):
        start = rng.randrange(SIZE // PAGE) * PAGE
        array[start : start + PAGE] = rng.randbytes(PAGE)
    for i in rng.sample(range(20_000), 500):
        objects[i] = (str(i), [i, float(i)], {"square": i * i})
    if calls % 3 == 0:
        gc.collect()
    garbage = [bytes(1 << 20) for _ in range(calls % 8)]
    digest = hashlib.sha256(array).hexdigest()
    time.sleep(event.get("hold", 0))
    return {
        "calls": calls,
        "intact": intact,
        "found": found,
        "digest": digest,
        "pid": os.getpid(),
        "garbage": len(garbage),
    }
