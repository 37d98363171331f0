"""A process whose memory is taken away and brought back: it knows what has to be in it."""

import ctypes
import hashlib
import mmap
import random
import sys
import threading
import time

# From linux/mman.h; the mmap module lacks it.
MADV_WIPEONFORK = 18

seed = int(sys.argv[1])
source = random.Random(seed)
# Alike in all subjects, with a little that is not; and something that is like nothing else.
common = bytearray(random.Random(0).randbytes(6 << 20))
for _ in range(200):
    common[source.randrange(len(common))] = source.randrange(256)
own = source.randbytes(1 << 20)
# Read again and again, and never written to.
zeros = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
zeros[0] = 1
objects = [(n, str(n * seed), {n: seed}) for n in range(20000)]
# Mapped later.
more = []
ticks = 0


def tick():
    global ticks
    while True:
        time.sleep(0.01)
        ticks += 1


threading.Thread(target=tick, daemon=True).start()


def digest():
    h = hashlib.sha256(common)
    h.update(own)
    h.update(zeros)
    h.update(repr(objects).encode())
    for mapping in more:
        h.update(mapping)
    return h.hexdigest()


expected = digest()
requests = 0
print("ready", flush=True)
for line in sys.stdin:
    if line == "wipe\n":
        # Touches none of it.
        zeros.madvise(MADV_WIPEONFORK)
        print("wiped", flush=True)
        continue
    if line in ("more\n", "more that stays\n"):
        mapping = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.write(own)
        if line == "more that stays\n":
            mapping.madvise(MADV_WIPEONFORK)
        more.append(mapping)
        expected = digest()
        print(ctypes.addressof(ctypes.c_char.from_buffer(mapping)), flush=True)
        continue
    requests += 1
    before = ticks
    deadline = time.monotonic() + 10
    while ticks == before and time.monotonic() < deadline:
        time.sleep(0.01)
    alive = ticks > before
    right = digest() == expected
    # A change in each round, so that no two are alike.
    at = source.randrange(len(common))
    common[at] ^= 0xFF
    expected = digest()
    print(f"{requests} {'right' if right else 'wrong'} {'alive' if alive else 'stuck'}", flush=True)
