"""What the server that forks readers imports first, and nothing else does: `lipprep.train.loader`, to fork it ready.

The server is started with signals blocked, so that what is sent to all processes of a run does not end it; what it
forks, for whomever, hears them again.
"""

import os
import signal

from lipprep.train.loader import SIGNALS

os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS))
