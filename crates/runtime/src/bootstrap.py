"""Starts AWS's runtime interface client as it is, and keeps the heap tidy while nothing is to do.

What a finished request leaves in the heap is of no use to anybody, but it is different in every
sandbox, so it would have to be kept. A moment after a request, if no other has come, garbage is
collected and the allocator gives free memory back. Objects that were made before the first request
are left out of later collections, so that a collection does not touch all of them.
"""

import gc
import sys
import threading

# A request that follows another this soon is not made to wait for tidying up, seconds.
QUIET = 0.1


class Tidier(threading.Thread):
    def __init__(self):
        super().__init__(name="tidier", daemon=True)
        self.waiting = threading.Event()
        self.working = threading.Event()
        self.trim = None

    def run(self):
        while True:
            self.waiting.wait()
            self.waiting.clear()
            if not self.working.wait(QUIET):
                self.tidy()

    def tidy(self):
        gc.collect()
        if self.trim is None:
            try:
                import ctypes

                self.trim = ctypes.CDLL(None).malloc_trim
            except Exception:
                # Another C library: its allocator does as it likes.
                self.trim = lambda pad: 0
        self.trim(0)


def main():
    # As "python -m" has it: the directory of this file is not a place to import from.
    del sys.path[0]
    import awslambdaric.__main__ as client
    from awslambdaric.lambda_runtime_client import LambdaRuntimeClient

    tidier = Tidier()
    wait = LambdaRuntimeClient.wait_next_invocation

    def wait_next_invocation(self):
        if not tidier.is_alive():
            gc.collect()
            gc.freeze()
            tidier.start()
        tidier.working.clear()
        tidier.waiting.set()
        request = wait(self)
        tidier.working.set()
        return request

    LambdaRuntimeClient.wait_next_invocation = wait_next_invocation
    client.main(sys.argv)


main()
