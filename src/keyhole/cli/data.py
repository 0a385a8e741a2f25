"""`keyhole data`: data sets that keyhole writes or reads in."""

from keyhole.cli.kinds import Kinds

KINDS = {
    "slides": "write labelled slides of generated tissue, of any size",
    "camelyon16": "make a manifest of the published CAMELYON16 tree, and say what is missing in it",
}

run = Kinds(
    "data",
    KINDS,
    about="Data sets to try keyhole on, and published ones as keyhole reads them.",
    noun="kind of data",
    notes=["  --print-config  after a kind: print the options as they result, and end"],
).run
