"""Where the sun stands: floating-point work with nothing but math and time.

For `size` moments, one every 37 minutes from a start that the seed chooses,
the elevation of the sun over one of 256 places, after the low-precision
formulas of the Astronomical Almanac (good to about 0.01 degrees).
"""

import hashlib
import math
import random
import struct
import time

DEFAULT_SIZE = 8_000
MAX_SIZE = 1_000_000
STEP_S = 37 * 60

_J2000_UNIX_S = 946_728_000


def _places():
    """(sine of latitude, cosine of latitude, longitude in radians) of each."""
    rng = random.Random(2022)
    places = []
    for _ in range(256):
        latitude = math.asin(rng.uniform(-1.0, 1.0))
        longitude = rng.uniform(-math.pi, math.pi)
        places.append((math.sin(latitude), math.cos(latitude), longitude))
    return places


PLACES = _places()


def sun_elevation(unix_s, place):
    """Elevation of the sun in degrees, refraction left out."""
    sin_latitude, cos_latitude, longitude = place
    days = (unix_s - _J2000_UNIX_S) / 86_400
    anomaly = math.radians((357.528 + 0.9856003 * days) % 360)
    mean_longitude = 280.460 + 0.9856474 * days
    ecliptic = math.radians(
        (mean_longitude + 1.915 * math.sin(anomaly) + 0.020 * math.sin(2 * anomaly)) % 360
    )
    obliquity = math.radians(23.439 - 0.0000004 * days)
    declination = math.asin(math.sin(obliquity) * math.sin(ecliptic))
    right_ascension = math.atan2(
        math.cos(obliquity) * math.sin(ecliptic), math.cos(ecliptic)
    )
    sidereal = math.radians((280.46062 + 360.98564737 * days) % 360)
    hour_angle = sidereal + longitude - right_ascension
    return math.degrees(
        math.asin(
            sin_latitude * math.sin(declination)
            + cos_latitude * math.cos(declination) * math.cos(hour_angle)
        )
    )


def handler(event, context):
    seed = int(event.get("seed", 0))
    size = int(event.get("size", DEFAULT_SIZE))
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size must be 1 to {MAX_SIZE}, not {size}")

    rng = random.Random(seed)
    start_s = rng.randrange(_J2000_UNIX_S, _J2000_UNIX_S + 25 * 365 * 86_400)
    elevations = [
        sun_elevation(start_s + i * STEP_S, PLACES[rng.randrange(len(PLACES))])
        for i in range(size)
    ]
    milli = [round(elevation * 1_000) for elevation in elevations]
    return {
        "start": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start_s)),
        "moments": size,
        "daylight": round(sum(e > 0 for e in elevations) / size, 6),
        "highest": round(max(elevations), 3),
        "lowest": round(min(elevations), 3),
        "mean": round(math.fsum(elevations) / size, 6),
        "sha256": hashlib.sha256(struct.pack(f"<{size}i", *milli)).hexdigest(),
    }
