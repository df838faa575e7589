"""What every worker does: get ready, then measure whenever it is told to."""

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median


def serve(facts: dict[str, object], measure: Callable[[str], float]) -> None:
    """Prints the facts, then for each line of standard input what was measured."""
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        try:
            found: dict[str, object] = {"ms": measure(line.strip())}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)


def milliseconds(
    step: Callable[[], object], seconds: float, clock: str = "perf_counter"
) -> float:
    """Median time of steps: three at least, one if it takes ten times as long."""
    read = getattr(time, clock)
    times = []
    begin = time.perf_counter()
    while True:
        start = read()
        step()
        times.append(1e3 * (read() - start))
        enough = seconds if len(times) >= 3 else 10 * seconds
        if time.perf_counter() - begin >= enough:
            return median(times)


def resident_rise_mb(step: Callable[[], object]) -> float:
    """How much more resident memory steps need than there is between them (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    idle = _status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    for _ in range(3):
        step()
    return _status_mb("VmHWM") - idle


def _status_mb(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6
