"""`keyhole data camelyon16`: the published tree on disk -> a manifest, and what is missing in it."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import ClassVar

from keyhole.cli.options import Options, print_options, read
from keyhole.config.settings import NotNegative, Rate
from keyhole.errors import OutputError


class Camelyon16Options(Options):
    """Make a manifest of a copy of CAMELYON16, and report what is missing, double or broken in it.

    Reads the tree of the challenge (training, testing) and that of the AWS copy (images, annotations, evaluation).
    Nothing is downloaded or changed; a copy of some of the slides is fine.
    """

    POSITIONAL: ClassVar = {"root": "ROOT"}

    root: Path
    """Folder that holds training and testing, or images."""
    out: Path = Path("camelyon16.csv")
    """CSV to write; paths in it are relative to its folder. A file that says something else is not overwritten."""
    features: Path | None = None
    """Folder of feature files (.h5, .pt) to train on instead of the slides, as CLAM, TRIDENT or `keyhole embed` wrote
    them; the slides themselves need not be there."""
    reference: Path | None = None
    """CSV with the labels of the test slides; default is every reference.csv under ROOT."""
    val: Rate = 0.15
    """Share of the training slides held out to choose the best model, in each class alike."""
    seed: NotNegative = 0
    """Another seed holds out others."""


def run(argv: list[str]) -> int:
    options = read(Camelyon16Options, argv, "keyhole data camelyon16")
    if options.print_config:
        return print_options(options)

    from keyhole.datasets.camelyon16 import read_camelyon16
    from keyhole.util.files import writable_folder, write_atomic

    out = options.out
    found = read_camelyon16(options.root, options.val, options.seed, options.features, options.reference)
    table = found.manifest(out.absolute().parent).encode()
    writable_folder(out.absolute().parent)
    if out.exists() and (not out.is_file() or out.read_bytes() != table):
        raise OutputError(f"{out}: is there already and says something else. Delete it, or choose another --out.")
    write_atomic(out, table)
    problems = out.with_name(f"{out.stem}-problems.csv")
    write_atomic(problems, found.problem_table().encode("utf-8", "backslashreplace"))
    print("\n".join(found.lines()))
    print(f"all {len(found.problems)} problems: {problems}")
    recipe = "camelyon16" if options.features is None else "camelyon16-features"
    print(f"{len(found.slides)} slides in {out}; train on them with: keyhole train {quote(str(out))} --recipe {recipe}")
    return 0
