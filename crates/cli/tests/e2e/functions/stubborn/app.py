"""Takes back that it is to be killed with whoever started it, and does not end by itself."""

import ctypes
import threading

PR_SET_PDEATHSIG = 1

refused = ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
threading.Thread(target=threading.Event().wait).start()


def handler(event, context):
    return {"refused": refused}
