"""Timers that go on firing, and waits with a time limit that go on waiting."""

import signal
import threading
import time

calls = 0
alarms = 0
timeouts = 0
condition = threading.Condition()


def on_alarm(number, frame):
    global alarms
    alarms += 1


def wait_with_limits():
    global timeouts
    while True:
        with condition:
            if not condition.wait(timeout=0.002):
                timeouts += 1


def sleep_for_long():
    # Interrupted and restarted by every dedup, for as long as the sandbox lives.
    while True:
        time.sleep(3600)


signal.signal(signal.SIGALRM, on_alarm)
signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
threading.Thread(target=wait_with_limits, daemon=True).start()
sleeper = threading.Thread(target=sleep_for_long, daemon=True)
sleeper.start()


def handler(event, context):
    global calls
    calls += 1
    alarms_before, timeouts_before = alarms, timeouts
    started = time.monotonic()
    while time.monotonic() - started < 10:
        if alarms >= alarms_before + 3 and timeouts >= timeouts_before + 3:
            break
        time.sleep(0.001)
    return {
        "calls": calls,
        "alarms": alarms - alarms_before >= 3,
        "timeouts": timeouts - timeouts_before >= 3,
        "sleeper": sleeper.is_alive(),
        "timer": signal.getitimer(signal.ITIMER_REAL)[1] > 0,
    }
