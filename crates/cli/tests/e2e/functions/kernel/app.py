"""State that the kernel keeps for a process: open files, connections, threads, a child, pipes."""

import os
import select
import socket
import subprocess
import sys
import threading
import time

CHILD = """
import sys
total, lines = 0, []
for line in sys.stdin:
    lines.append(line)
    total += int(line)
    print(total, len(lines), flush=True)
"""

calls = 0
ticks = 0
written = []

log = open("/tmp/lines", "w+")
unlinked = open("/tmp/gone", "w+b")
os.unlink("/tmp/gone")
local, remote = socket.socketpair()
# A connection over TCP, both ends in this process.
listener = socket.create_server(("127.0.0.1", 0))
caller = socket.create_connection(listener.getsockname())
accepted, _ = listener.accept()
child = subprocess.Popen(
    [sys.executable, "-I", "-S", "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
)
poll = select.epoll()
poll.register(local.fileno(), select.EPOLLIN)


def count():
    global ticks
    while True:
        ticks += 1
        time.sleep(0.001)


def shout(connection):
    """Answers each message in capitals, and with how many there have been."""
    messages = 0
    while message := connection.recv(65536):
        messages += 1
        connection.sendall(message.upper() + b" %d" % messages)


threading.Thread(target=count, daemon=True).start()
threading.Thread(target=shout, args=[remote], daemon=True).start()
threading.Thread(target=shout, args=[accepted], daemon=True).start()


def handler(event, context):
    global calls
    calls += 1

    log.seek(0)
    lines = log.read().splitlines()
    file_intact = lines == written
    written.append(f"line {calls} " + "x" * 500)
    log.write(written[-1] + "\n")
    log.flush()
    position = unlinked.tell()
    unlinked.write(b"z" * 1000)
    unlinked.flush()

    local.sendall(b"over a socketpair")
    ready = poll.poll(10) == [(local.fileno(), select.EPOLLIN)]
    over_pair = local.recv(65536).decode()
    caller.sendall(b"over tcp")
    over_tcp = caller.recv(65536).decode()

    child.stdin.write(f"{calls}\n")
    child.stdin.flush()
    child_says = child.stdout.readline().split()

    before = ticks
    deadline = time.monotonic() + 10
    while ticks <= before and time.monotonic() < deadline:
        time.sleep(0.001)
    return {
        "calls": calls,
        "file_intact": file_intact and len(lines) == calls - 1,
        "position": position,
        "ready": ready,
        "over_pair": over_pair,
        "over_tcp": over_tcp,
        "child": [int(n) for n in child_says],
        "child_pid": child.pid,
        "ticks": ticks,
        "thread_runs": ticks > before,
        "threads": threading.active_count(),
    }
