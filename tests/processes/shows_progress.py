"""Show progress of four images and one line that stays, from the bar itself or, with `print`, from elsewhere."""

import sys

from keyhole.util.progress import Progress

with Progress(4, "epoch 1/2") as progress:
    say = print if sys.argv[1:] == ["print"] else progress.line
    for number in range(4):
        progress.update(images=1, patches=50, waited=0.0, text="loss 0.5")
        if number == 1:
            say("a line that stays")
