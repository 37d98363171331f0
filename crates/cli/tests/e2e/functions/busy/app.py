"""Takes as long as it is told to, and counts."""

import time

calls = 0


def handler(event, context):
    global calls
    calls += 1
    print(f"call {calls}: {event.get('say', '')}", flush=True)
    time.sleep(event.get("seconds", 0))
    return {"calls": calls}
