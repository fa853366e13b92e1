"""Prints the Python stack of a rank that holds Python's lock (GIL) too long for a thread to do so.

mpi4py, for example, keeps the lock while the first collective of Python objects on a communicator
duplicates it. So the watchdog's thread sets a timer of the kernel, again and again. If the thread
cannot get the lock for almost stall_timeout seconds, the timer raises a signal, whose handler is C
(Python's faulthandler) and needs no lock. faulthandler.dump_traceback_later is not used, because a
process has only one of these, which may be the user's. Needs Linux.
"""

import ctypes
import faulthandler
import signal
import sys
from time import perf_counter

LEAST = 10.0  # seconds without the lock that are normal, as in a large garbage collection
SHARE = 0.9  # of the time that other ranks wait, so that it is printed before they end the job

_timer = None  # (the C library, its timer), or False where there is none
_seconds, _since = None, 0.0


class _Time(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class _Setting(ctypes.Structure):  # struct itimerspec
    _fields_ = [("interval", _Time), ("value", _Time)]


class _Event(ctypes.Structure):  # struct sigevent; notify 0 is SIGEV_SIGNAL
    _fields_ = [("value", ctypes.c_void_p), ("signal", ctypes.c_int), ("notify", ctypes.c_int),
                ("rest", ctypes.c_char * 48)]


def allow(seconds):
    """Other ranks wait this many seconds for this one; of several calls the least counts."""
    global _seconds
    wanted = max(LEAST, SHARE * seconds)
    _seconds = wanted if _seconds is None else min(_seconds, wanted)


def put_off():
    """The caller has the lock, so the time starts again. At most 20 system calls in that time."""
    global _since
    seconds = _seconds  # once: another thread may call `cancel`
    if seconds is not None and perf_counter() - _since > seconds / 20:
        _since = perf_counter()
        _set(seconds)


def cancel():
    """Stop the timer for good: the program ends."""
    global _seconds
    _seconds = None
    _set(0)


def _set(seconds):
    global _timer
    if _timer is None:
        _timer = _make() if seconds else None
    if _timer:
        library, timer = _timer
        whole = int(seconds)
        value = _Setting(value=_Time(whole, int((seconds - whole) * 1e9)))
        library.timer_settime(timer, 0, ctypes.byref(value), None)


def _make():
    """(C library, a timer of this process), with a handler for its signal; False if impossible."""
    if not sys.platform.startswith("linux"):
        return False
    number = next((n for n in range(signal.SIGRTMAX, signal.SIGRTMIN, -1)
                   if signal.getsignal(n) == signal.SIG_DFL), None)
    library, timer = ctypes.CDLL(None), ctypes.c_void_p()
    if number is None or not hasattr(library, "timer_create"):
        return False
    faulthandler.register(number, file=2, all_threads=True)
    if library.timer_create(1, ctypes.byref(_Event(signal=number)), ctypes.byref(timer)):
        faulthandler.unregister(number)
        return False
    return library, timer
