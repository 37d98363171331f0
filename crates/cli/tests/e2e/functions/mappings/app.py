"""A program that changes its mappings and its processes right after its memory was taken away."""

import ctypes
import hashlib
import mmap
import multiprocessing
import os
import random
import subprocess
import sys
import threading

PAGE = 4096
MIB = 1 << 20

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
MREMAP_MAYMOVE, MADV_DONTNEED, MADV_FREE = 1, 4, 8
FAILED = ctypes.c_void_p(-1).value

calls = 0


class Region:
    """Anonymous memory of which it is known what has to be in each page."""

    def __init__(self, pages):
        self.address = libc.mmap(None, pages * PAGE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert self.address != FAILED
        self.pages = [bytes(PAGE)] * pages
        for n in range(pages):
            self.write(n, os.urandom(PAGE))

    def write(self, n, content):
        ctypes.memmove(self.address + n * PAGE, content, PAGE)
        self.pages[n] = content

    def wrong(self):
        return [
            n
            for n, want in enumerate(self.pages)
            if ctypes.string_at(self.address + n * PAGE, PAGE) != want
        ]

    def resize(self, pages):
        moved = libc.mremap(self.address, len(self.pages) * PAGE, pages * PAGE, MREMAP_MAYMOVE)
        assert moved != FAILED, os.strerror(ctypes.get_errno())
        self.address = moved
        self.pages = (self.pages + [bytes(PAGE)] * pages)[:pages]

    def drop(self, first, count):
        """Gives pages back to the kernel: they have to read as zeros from now on."""
        assert libc.madvise(self.address + first * PAGE, count * PAGE, MADV_DONTNEED) == 0
        self.pages[first : first + count] = [bytes(PAGE)] * count

    def protect(self, first, count, protection):
        assert libc.mprotect(self.address + first * PAGE, count * PAGE, protection) == 0

    def unmap(self):
        assert libc.munmap(self.address, len(self.pages) * PAGE) == 0


regions = [Region(256) for _ in range(6)]
shared = mmap.mmap(-1, MIB)  # MAP_SHARED
shared[:8] = b"together"
private = bytearray(os.urandom(4 * MIB))
digest = hashlib.sha256(private).hexdigest()


def in_a_fork(work):
    """What `work` returns in a forked child: its exit status says whether all was right."""
    pid = os.fork()
    if pid == 0:
        ok = False
        try:
            ok = work()
        finally:
            os._exit(0 if ok else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def child_sees_all():
    fine = hashlib.sha256(private).hexdigest() == digest
    fine = fine and not any(region.wrong() for region in regions)
    private[:] = bytes(len(private))  # The parent must see nothing of it.
    regions[0].write(0, bytes(PAGE))
    return fine


def square(n):
    return n * n, hashlib.sha256(private).hexdigest() == digest


def handler(event, context):
    global calls
    calls += 1
    rng = random.Random(calls)
    done = []

    def move():
        # Before anything reads them: pages that were never brought back move along.
        region = rng.choice(regions)
        region.resize(rng.randrange(128, 512))

    def unmap():
        regions.pop(rng.randrange(len(regions))).unmap()
        regions.append(Region(rng.randrange(128, 400)))

    def drop():
        region = rng.choice(regions)
        first = rng.randrange(len(region.pages) - 64)
        region.drop(first, 64)

    def protect():
        region = rng.choice(regions)
        region.protect(8, 32, mmap.PROT_READ)
        region.protect(16, 8, 0)
        region.protect(8, 32, mmap.PROT_READ | mmap.PROT_WRITE)

    def fork():
        assert in_a_fork(child_sees_all), "a forked child sees other memory"

    def fork_while_others_read():
        wrong = []

        def read():
            for region in regions:
                wrong.extend(region.wrong())

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        fork()
        for reader in readers:
            reader.join()
        assert not wrong, f"pages {wrong}"

    def workers():
        # Started by fork, the default on Linux up to Python 3.13; pipes, for /dev/shm may be small.
        ours, theirs = multiprocessing.Pipe()

        def work(n):
            theirs.send(square(n))

        all_of_them = [multiprocessing.get_context("fork").Process(target=work, args=[n]) for n in range(3)]
        for process in all_of_them:
            process.start()
        answers = sorted(ours.recv() for _ in all_of_them)
        for process in all_of_them:
            process.join()
        assert answers == [(0, True), (1, True), (4, True)], answers

    def spawn():
        out = subprocess.run(["/bin/sh", "-c", "echo $((6 * 7))"], capture_output=True, check=True)
        assert out.stdout == b"42\n", out

    def share():
        count = shared[8]
        assert in_a_fork(lambda: shared[:8] == b"together" and shared.__setitem__(8, count + 1) is None)
        assert shared[8] == count + 1

    def write():
        region = rng.choice(regions)
        for _ in range(20):
            region.write(rng.randrange(len(region.pages)), rng.randbytes(PAGE))

    actions = [move, unmap, drop, protect, fork, fork_while_others_read, workers, spawn, share, write]
    # Each action comes first, when nothing has been brought back yet, once in a while.
    first = actions[calls % len(actions)]
    for action in [first, *rng.sample(actions, 4)]:
        action()
        done.append(action.__name__)

    wrong = {n: region.wrong() for n, region in enumerate(regions) if region.wrong()}
    return {
        "calls": calls,
        "done": done,
        "wrong": wrong,
        "private": hashlib.sha256(private).hexdigest() == digest,
        "shared": shared[:8] == b"together",
        "children": len(multiprocessing.active_children()),
    }
