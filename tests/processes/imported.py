"""Do something, then print on the last line which modules of a list it has imported.

`python imported.py MODULE,... package|timing|worker`, or `... help VERB ...`, or `... read FILE`.
"""

import sys

modules, what, *arguments = sys.argv[1:]
if what == "package":
    import keyhole

    dir(keyhole)
elif what == "timing":
    import keyhole.util.progress
    import keyhole.util.timing
elif what == "worker":
    from keyhole.tools.check import worker

    worker.main()
elif what == "help":
    from keyhole.cli.main import main

    main([*arguments, "--help"])
else:
    from keyhole.images import open_image

    open_image(arguments[0]).read((0, 0, 4, 4))
print(sorted(set(modules.split(",")) & set(sys.modules)))
