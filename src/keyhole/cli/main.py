"""The command `keyhole`: finds the verb, imports only what it needs, and turns every error into one line.

Exit codes: 0 done, 1 `check` or `doctor` found a fault, 2 wrong input or no place to write, 70 a bug in keyhole,
128 + signal when stopped (130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 138 SIGUSR1, 141 a closed pipe).
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from keyhole.errors import ConfigError, ImageError, Interrupted, KeyholeError
from keyhole.util.version import VERSION

VERBS = {
    "demo": "write images with small digits in them, train, evaluate: everything once, in minutes",
    "check": "open every image of a data set and say what would go wrong, with a fix for each",
    "init": "measure a data set and write a commented configuration for it",
    "train": "learn from a folder of classes or a CSV, into a run folder",
    "resume": "go on with a run that was stopped",
    "evaluate": "metrics of a run with intervals, on its test split or on other data",
    "compare": "runs side by side: differences with intervals, cases that changed, settings that differ",
    "embed": "every patch of every image through an encoder once, into files of features to train on",
    "predict": "labels of images, and what they rest on",
    "view": "look at images, predictions and what they rest on, in a browser",
    "data slides": "write labelled slides of generated tissue, of any size, to try keyhole on",
    "data megapixel-mnist": "draw canvases with handwritten digits among noise, as published, of any size",
    "data camelyon16": "make a manifest of the published CAMELYON16 tree, and say what is missing in it",
    "data traffic-signs": "make a manifest of Swedish Traffic Signs for the published task",
    "bench speed": "measure training steps beside the encoder alone, and where the time goes",
    "doctor": "try every reader and one training step on this machine",
}

SKIPPING = dict.fromkeys(("predict", "evaluate", "embed"), "--on-bad-image") | {"train": "--data.on-bad-image"}
"""Options with which a verb leaves out images that cannot be read."""
USAGE_ERROR, INTERNAL_ERROR = 2, 70


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; `argv` defaults to the arguments of the process."""
    # torch reads this on import: threads that spin while they wait take cores from those that decode
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug, arguments = _without_debug(list(sys.argv[1:] if argv is None else argv))
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name need not be valid text
    try:
        try:
            code = _dispatch(arguments)
        except SystemExit as stop:  # --help has been printed
            code = stop.code if isinstance(stop.code, int) else 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        from keyhole.util.platform import BROKEN_PIPE_EXIT  # loads sockets, which --help does not need

        _drop_output()  # as in `keyhole check | head`
        return BROKEN_PIPE_EXIT
    except KeyboardInterrupt:
        if debug:
            raise
        return _say("interrupted", 128 + signal.SIGINT, kind="")
    except Exception as error:
        if debug:
            raise
        return _explain(error, arguments)


def module_of(verb: str) -> str:
    """Return the module that runs a verb."""
    return f"keyhole.cli.{verb.replace(' ', '_').replace('-', '_')}"


def _dispatch(arguments: list[str]) -> int:
    for count in (1, 2):
        if " ".join(arguments[:count]) in VERBS:
            code: int = import_module(module_of(" ".join(arguments[:count]))).run(arguments[count:])
            return code
    first = arguments[0] if arguments else ""
    if first in ("--version", "-V"):
        print(f"keyhole {VERSION}")
        return 0
    group = {verb: what for verb, what in VERBS.items() if verb.startswith(f"{first} ")}
    if first in ("", "-h", "--help") or (group and {"-h", "--help"}.intersection(arguments)):
        print(_help(group or VERBS))
        return 0 if first else USAGE_ERROR
    from keyhole.util.wording import nearest

    named, kind = " ".join(arguments[: 2 if group else 1]), "option" if first.startswith("-") else "verb"
    known = ["--help", "--version"] if kind == "option" else [*VERBS, *(f"{first} --help" for _ in group)]
    near = nearest(named, known, quote="`")
    raise ConfigError(f"there is no {kind} `{named}`{near}; `keyhole --help` lists what there is")


def _help(verbs: Mapping[str, str]) -> str:
    width = max(map(len, verbs))
    return "\n".join(
        [
            "usage: keyhole VERB [...]      keyhole VERB --help shows the options of a verb",
            "",
            "Train, evaluate and serve image classifiers on images of any size.",
            "",
            *(f"  {verb:{width}}  {what}" for verb, what in verbs.items()),
            "",
            "  --version  print the version",
            "  --debug    anywhere on the line: show the traceback of an error",
            "",
            "First steps: keyhole demo; then, on your own data, keyhole check DATA, keyhole init DATA,",
            "keyhole train --config keyhole.yaml.",
        ]
    )


def _open_streams() -> None:
    """Open closed standard streams (`>&-`) on the null device, or the next file opened would get what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - as long as the process


def _without_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """Remove `--debug` from anywhere before a `--`, after which every word is a file name."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end] if argument != "--debug"]
    return len(options) < end, options + arguments[end:]


def _explain(error: Exception, arguments: list[str]) -> int:
    if isinstance(error, Interrupted):
        return _say(str(error), 128 + error.signal_number, kind="")
    if isinstance(error, KeyholeError):
        option = SKIPPING.get(arguments[0]) if isinstance(error, ImageError) else None
        said = str(error).rstrip(".")
        if option is None or "on-bad-image" in f"{said} {' '.join(arguments)}".replace("_", "-"):
            return _say(str(error), USAGE_ERROR)
        return _say(f"{said}. To leave such images out: {option} skip", USAGE_ERROR)
    if isinstance(error, OSError) and error.errno is not None:
        # a full disk, a missing permission or a lost network share is the state of the machine, not a bug
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        place = f"{error.filename}: " if error.filename else ""
        return _say(f"{place}{error.strerror or error}", USAGE_ERROR)
    from keyhole.util.budget import doubt, explained, out_of_memory

    if out_of_memory(error):
        lower = "--select.chunk, --select.m, --train.batch, --patch.size or --model.width"
        advice = f"give a budget with --memory, or lower {lower}"
        said = f"out of memory ({error})" if str(error) and not doubt(error) else "out of memory"
        return _say(explained(error, said, advice), USAGE_ERROR)
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    what = " ".join([what, *getattr(error, "__notes__", ())])
    return _say(f"{what} (--debug shows the traceback)", INTERNAL_ERROR, kind="internal error: ")


def _drop_output() -> None:
    """Discard what could not be written to standard output; otherwise Python tries again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(message: str, code: int, kind: str = "error: ") -> int:
    with contextlib.suppress(OSError):  # standard error may be a file on the disk that is full
        print(f"keyhole: {kind}{' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
