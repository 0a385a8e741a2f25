"""`keyhole bench`: what this machine makes of a model and data."""

from keyhole.cli.kinds import Kinds

KINDS = {
    "speed": "training steps beside the encoder alone, where the time goes, and what to do about it",
}

run = Kinds(
    "bench",
    KINDS,
    about="Measures on this machine, with your model and your data.",
    noun="kind of measurement",
    notes=[
        "  --json          after a kind: one JSON object on standard output",
        "  --print-config  after a kind: print the configuration that results, and end",
    ],
).run
