"""`keyhole doctor`: try every reader and one training run on this machine."""

from __future__ import annotations

from pathlib import Path

from keyhole.cli.options import Options, print_config, read


class DoctorOptions(Options):
    """Try every reader on small images and train for a few seconds, and say what is missing.

    Writes only to a temporary folder. Exit code 1 if something that is needed does not work.
    """


def run(argv: list[str]) -> int:
    options = read(DoctorOptions, argv, "keyhole doctor")
    from keyhole.tools import doctor

    if options.print_config:
        return print_config(doctor.training_config(Path("temporary")))
    failed = 0
    for check in doctor.examine():
        print(check, flush=True)
        failed += check.state == "FAIL"
    print(f"{failed} things do not work" if failed > 1 else "1 thing does not work" if failed else "all is well")
    return 1 if failed else 0
