"""Tests, and the tiny runs that bench/ has in common with them."""

import signal

# Under nohup every process that is started would ignore SIGHUP, which runs are tested to take: here it is not heeded.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)
