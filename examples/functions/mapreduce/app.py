"""Word count with processes: map in children, shuffle, reduce in children.

`size` is the number of generated lines. Lambda has no /dev/shm and with it
no semaphores, so multiprocessing's Pool and Queue do not work there; Process
and Pipe do. Every child has ended before the handler returns.
"""

import collections
import hashlib
import json
import multiprocessing
import random
import zlib

DEFAULT_SIZE = 2_000
MAX_SIZE = 500_000
MAX_WORKERS = 16

# Children start as copies of this process and inherit their input, which no
# other start method can do without sending it through a pipe first.
FORK = multiprocessing.get_context("fork")


def _vocabulary():
    """4,000 pronounceable words; a word's rank is its place in the list."""
    rng = random.Random(2022)
    syllables = [c + v for c in "bcdfghklmnprstvz" for v in "aeiou"]
    words = {}
    while len(words) < 4_000:
        words["".join(rng.choices(syllables, k=rng.randint(1, 4)))] = None
    return list(words)


VOCABULARY = _vocabulary()
# Zipf's law: the word of rank r comes up in proportion to 1/r.
CUMULATIVE = []
for _rank in range(1, len(VOCABULARY) + 1):
    CUMULATIVE.append((CUMULATIVE[-1] if CUMULATIVE else 0.0) + 1.0 / _rank)


def generate(seed, lines):
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(VOCABULARY, cum_weights=CUMULATIVE, k=rng.randint(4, 12)))
        for _ in range(lines)
    ]


def map_words(lines, partitions):
    """Count the words of some lines, split by the reducer they belong to."""
    counts = [collections.Counter() for _ in range(partitions)]
    for line in lines:
        for word in line.split():
            counts[zlib.crc32(word.encode()) % partitions][word] += 1
    return counts


def reduce_counts(parts):
    total = collections.Counter()
    for part in parts:
        total.update(part)
    return total


def _child(sender, work, arguments):
    sender.send(work(*arguments))
    sender.close()


def in_processes(work, tasks):
    """[work(*task) for task in tasks], each in a process of its own."""
    running = []
    try:
        for task in tasks:
            receiver, sender = FORK.Pipe(duplex=False)
            process = FORK.Process(target=_child, args=(sender, work, task))
            process.start()
            sender.close()
            running.append((process, receiver))
        results = []
        for process, receiver in running:
            try:
                results.append(receiver.recv())
            except EOFError:
                process.join()
                raise RuntimeError(f"a worker died, exit code {process.exitcode}") from None
        return results
    finally:
        for process, receiver in running:
            receiver.close()
            process.join()
            process.close()


def handler(event, context):
    seed = int(event.get("seed", 0))
    size = int(event.get("size", DEFAULT_SIZE))
    workers = int(event.get("workers", 2))
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size must be 1 to {MAX_SIZE}, not {size}")
    if not 1 <= workers <= MAX_WORKERS:
        raise ValueError(f"workers must be 1 to {MAX_WORKERS}, not {workers}")

    lines = generate(seed, size)
    mapped = in_processes(map_words, [(lines[i::workers], workers) for i in range(workers)])
    shuffled = [([counts[p] for counts in mapped],) for p in range(workers)]
    counts = {}
    for reduced in in_processes(reduce_counts, shuffled):
        counts.update(reduced)

    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {
        "lines": size,
        "words": sum(counts.values()),
        "distinct": len(counts),
        "top": [list(item) for item in ordered[:5]],
        "sha256": hashlib.sha256(json.dumps(ordered).encode()).hexdigest(),
    }
