"""`keyhole view`: images, predictions and what they rest on, in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from keyhole.cli.options import Options, print_options, read
from keyhole.config.settings import Bits
from keyhole.errors import ConfigError


class ViewOptions(Options):
    """Look at images, what was predicted for them, and the patches that this rests on, in a browser.

    Serves on one port of this machine until Ctrl-C. Nothing is computed and nothing is written: scores are those that
    `keyhole evaluate` or `keyhole predict` stored.
    """

    EXAMPLES: ClassVar = ("keyhole view runs/one", "keyhole view answers", "keyhole view slides/*.svs --port 9000")
    POSITIONAL: ClassVar = {"paths": "RUN|FOLDER|IMAGES"}
    METAVARS: ClassVar = {"port": "N", "root": "DIR"}

    paths: tuple[Path, ...] = ()
    """One run, one folder of predictions or of an evaluation, or images and folders of them."""
    root: Path | None = None
    """Folder to which the images of the run or of the predictions were moved."""
    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port to serve on, 0 for any that is free; default is 8765 or the next that is free."""
    address: str = "127.0.0.1"
    """Address to serve on. Other than the default, which only this machine reaches, every request needs the token in
    the link that is printed."""
    token: bool = False
    """Ask for the token on this machine too, where others are logged in."""
    bits: Bits | None = None
    """Bits in use of 16-bit images that do not state them."""
    no_browser: bool = False
    """Do not open the browser, which is opened where there is one."""


def run(argv: list[str]) -> int:
    options = read(ViewOptions, argv, "keyhole view")
    if options.print_config:
        return print_options(options)
    if not options.paths:
        raise ConfigError("nothing to look at: keyhole view RUN, a folder of predictions, or IMAGES")
    try:
        from keyhole.view.server import Place, serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("starlette", "uvicorn", "xstatic"):
            raise
        raise ConfigError(
            f"the viewer needs {error.name}: pip install '.[view]' in the folder of keyhole's source"
        ) from error
    from keyhole.view.collection import open_collection

    collection = open_collection(options.paths, options.root)
    serve(collection, Place(options.address, options.port, options.token), options.bits, not options.no_browser)
    return 0
