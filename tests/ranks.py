"""How the ranks of a test run stay together: outcomes they agree on, time limits, last words.

After each test the ranks exchange how it went. A rank that failed, and whose peers do not come
because they hang in a collective that it left, ends the job; so does a test that exceeds its limit
and a rank that leaves the suite early. Whatever ends the job says first, on stderr and tagged with
its rank, what happened and where.
"""

import atexit
import contextlib
import faulthandler
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback

from mpi4py import MPI

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
SUITE = WORLD.Dup()  # for the outcomes: out of the tests' reach

# These end what hangs. On a machine with much else to do a test takes twenty times as long as it
# should, so none of them is near to what anything takes.
LIMIT = 600  # seconds for one test, set-up and teardown included
JOB = 500  # for a job that a test starts, so that the test can say what it printed
PATIENCE = 60  # in which the others must come to where a rank has failed
PARTING = 300  # and to the end of the suite, where rank 0 still has its report to write
PASSED, SKIPPED, FAILED, LEAVING = range(4)

running = None  # the test that this rank is in
last_words = []  # why this rank leaves the suite, where it did not come to its end
stderr = 2  # the real one, when pytest captures


def say(text):
    """Write `text` to the real stderr in one piece, each line tagged with the rank."""
    tag = f"[rank {RANK} of {SIZE} on {socket.gethostname()}] "
    os.write(stderr, "".join(f"{tag}{line}\n" for line in text.splitlines()).encode())


def end():
    """End all ranks, after giving them the time to say what they have to say."""
    time.sleep(1)
    WORLD.Abort(1)


def arrived(request, seconds=float("inf")):
    """Whether `request` completes in time. Sleeps between looks: there may be few cores."""
    late, pause = time.monotonic() + seconds, 1e-4
    while not request.Test():
        if time.monotonic() > late:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.01)
    return True


def meet(code, text=""):
    """The codes of all ranks, once all have come here; the job ends if some rank will not.

    With nothing wrong on this rank there is no hurry, since every other rank has a limit of its
    own. But the others may be waiting in a collective for a rank that failed or leaves.
    """
    codes = bytearray(SIZE)
    request = SUITE.Iallgather([bytes([code]), MPI.BYTE], [codes, MPI.BYTE])
    if code in (PASSED, SKIPPED):
        arrived(request)
    elif not arrived(request, PARTING if code == LEAVING and not last_words else 1):
        say(text)
        if not arrived(request, PATIENCE - 1):
            say(f"the other ranks did not come within {PATIENCE} s: ending all of them")
            end()
    if LEAVING in codes and len(set(codes)) > 1:
        say(text or "cannot go on: another rank left the suite")
        end()
    return list(codes)


@atexit.register
def part():
    """Leave together: a rank that goes alone would wait for the others in MPI_Finalize."""
    if SIZE > 1:
        meet(LEAVING, "\n".join(["left the suite", *last_words]))
        faulthandler.dump_traceback_later(PARTING, exit=True, file=stderr)
        MPI.Finalize()  # before mpi4py, which would call Abort where the exit code is not 0
        faulthandler.cancel_dump_traceback_later()


def merge(texts):
    """One report of what each rank has to say; those that say the same are named together."""
    groups = {}
    for rank, text in enumerate(texts):
        if text:
            groups.setdefault(re.sub("0x[0-9a-f]+", "", text), []).append(rank)
    return "\n".join(f"rank {', '.join(map(str, ranks))} of {SIZE}: {texts[ranks[0]]}"
                     for ranks in groups.values())


def leave(why, status):
    """From another thread: say where the test is, and end this rank, and so the job."""
    if running:
        frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
        own = next((i for i, f in enumerate(frames) if f.filename == str(running.path)), -5)
        say(f"{running.nodeid} {why} here:\n" + "".join(traceback.format_list(frames[own:])))
    time.sleep(status == 1)  # the other ranks' turn
    os._exit(status)


def watch_for_sigterm():
    """Ranks that hang have something to say when mpirun, or a time limit, ends them.

    Python's own handlers do not run inside an MPI call; what wakes this thread does.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch():
        while os.read(reader, 1) != bytes([signal.SIGTERM]):
            pass
        leave("was ended", 128 + signal.SIGTERM)

    def forget():  # a forked child would wake its parent's thread
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    os.register_at_fork(after_in_child=forget)
    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def limited(item):
    """End the job when this test takes too long on this rank, even inside an MPI call."""
    global running
    running = item
    mark = item.get_closest_marker("limit")
    seconds = mark.args[0] if mark else LIMIT
    timer = threading.Timer(seconds, leave, (f"exceeded its limit of {seconds} s", 1))
    timer.daemon = True
    timer.start()
    # That thread needs the interpreter; this one does not, should an extension never let it go.
    faulthandler.dump_traceback_later(seconds + 30, exit=True, file=stderr)
    try:
        yield
    finally:
        running = None
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def failure_text(report):
    """A headline, the traceback and what was printed, as plain text that can travel."""
    crash = getattr(report.longrepr, "reprcrash", None)
    headline = crash.message.splitlines()[0] if crash and crash.message else "failed"
    captured = (f"\n---- {name} ----\n{content}" for name, content in report.sections)
    return f"{headline}\n{report.longreprtext}{''.join(captured)}"


def agree(reports):
    """Make the reports of one test on this rank say what happened on all ranks."""
    failed = [report for report in reports if report.failed]
    text = "\n".join(map(failure_text, failed))
    code = FAILED if failed else SKIPPED if any(report.skipped for report in reports) else PASSED
    codes = meet(code, text)
    if len(set(codes)) == 1 and code != FAILED:
        return
    texts = SUITE.allgather(text or ("", "skipped here, but not on all ranks")[code == SKIPPED])
    report = (failed or [r for r in reports if r.when == "call"] or reports)[0]
    report.outcome, report.longrepr = "failed", merge(texts)
