"""The command `percepnet serve`: one process, or a supervisor with a worker for each core."""

import argparse
import os
import sys
from contextlib import ExitStack, suppress

from percepnet.errors import reason
from service import cores, logs, wakeups
from service.settings import Settings, SettingsError, add_arguments, unknown_variables
from service.supervisor import CANNOT_LISTEN, Supervisor, listening

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; returns the exit status of the process."""
    try:
        settings = Settings.load(os.environ, vars(args))
    except SettingsError as error:
        return _refuse(error, 2)
    logs.configure(settings.log_threshold)
    for name in unknown_variables(os.environ):
        logs.logger.warning("no such setting: %s", name)
    n_workers = settings.workers or cores.count()
    if n_workers > 1:
        return Supervisor(settings, vars(args), n_workers).run()
    try:
        with ExitStack() as held:
            listening(settings, held)
    except OSError as error:
        logs.logger.error(CANNOT_LISTEN, reason(error))
        return 1

    cores.share_calmly()
    wakeups.read_directly()
    from service.main import FAILURES, Server, load_enhancer  # a supervisor has no use for all this

    try:
        server = Server(settings, load_enhancer(settings), share=cores.share(1))
    except FAILURES as error:
        return _refuse(error, 2 if isinstance(error, SettingsError) else 1)
    with suppress(KeyboardInterrupt):  # the server stops in good order, then raises the signal again
        server.run()
    return 0


def _refuse(error: Exception, status: int) -> int:
    print(f"percepnet serve: {error}", file=sys.stderr)
    return status
