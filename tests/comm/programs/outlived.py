"""Runs a Python program as a child, so that MPICH's mpirun does not end the other ranks when it dies."""

from __future__ import annotations

import signal
import subprocess
import sys

# By this mpirun tells of a death, and it would end who does not expect it; children inherit that.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
subprocess.run([sys.executable, *sys.argv[1:]], check=False, close_fds=False)  # PMI uses a descriptor
