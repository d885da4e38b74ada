"""Work in a child process that can be killed. A fork has everything imported, which takes a new process seconds."""

import os
import traceback


def forked(work):
    """Start `work()` in a child; returns its process id. The child ends with 1 if an exception ends `work`."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)  # nothing of the test run must go on in the child
    return child


def ended(child):
    """Wait for a child; its exit status, or the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
