"""The `percepnet` command."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from io import TextIOWrapper

from percepnet.errors import ParameterError, PercepNetError, reason

EXIT_FAILED = 1
"""The work could not be done, or not for all files."""

EXIT_USAGE = 2
"""The command line asks for what is not accepted, or for what is not installed."""

EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """A subcommand that lives in a module with `add_arguments(parser)` and `run(arguments)`."""

    help: str
    module: str
    extra: str | None = None
    """The optional part of the installation that it needs."""


COMMANDS = {
    "enhance": Command("enhance audio files", "percepnet.recordings"),
    "info": Command("show the model, the delay and the CPU's path", "percepnet.info"),
    "stream": Command("enhance audio files through live streams of a server", "service.client.command"),
    "serve": Command("run the service", "service.serve"),
    "load": Command("measure what live streams cost a server", "service.load"),
    "oracle": Command("show what perfect gains would reach", "percepnet.oracle", "measure"),
    "bench": Command("measure the speed on this machine", "percepnet.bench"),
    "prepare": Command("turn recordings into training data", "percepnet.training.prepare", "train"),
    "train": Command("train a network", "percepnet.training.train", "train"),
    "export": Command("turn a trained network into a model", "percepnet.training.export", "train"),
    "evaluate": Command("score a model", "percepnet.training.evaluate", "measure"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 failed, 2 not accepted, 130 interrupted)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, TextIOWrapper):
        # A file's name may be beyond the terminal's letters.
        sys.stdout.reconfigure(errors="backslashreplace")
    name = argv[0] if argv and argv[0] in COMMANDS else None
    parser = argparse.ArgumentParser(
        prog="percepnet", description="Remove noise and reverberation from speech."
    )
    parser.add_argument("--version", action="version", version=f"percepnet {version('percepnet')}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    try:
        run: Callable[[argparse.Namespace], int | None] | None = None
        for each, command in COMMANDS.items():
            subparser = subparsers.add_parser(each, help=command.help, description=f"{command.help}.")
            if each == name:
                # Only the module that is asked for is imported: enhancing needs neither torch nor a server.
                module = importlib.import_module(command.module)
                module.add_arguments(subparser)
                run = module.run
        arguments = parser.parse_args(argv)
        if run is None:
            parser.error("the command comes first")
        return run(arguments) or 0
    except ModuleNotFoundError as error:
        return _complain(_what_to_install(name, error), EXIT_USAGE)
    except ParameterError as error:
        return _complain(error, EXIT_USAGE)
    except (PercepNetError, OSError) as error:
        return _complain(reason(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_INTERRUPTED)


def _what_to_install(name: str | None, error: ModuleNotFoundError) -> str:
    if name is None or error.name == COMMANDS[name].module:
        return f"this installation has no `percepnet {name}`"
    extra = COMMANDS[name].extra
    command = f"pip install -e '.[{extra}]'" if extra else "pip install -e ."
    return f"`percepnet {name}` needs the module {error.name!r}: {command} in this project's folder"


def _complain(message: object, status: int) -> int:
    print(f"percepnet: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
