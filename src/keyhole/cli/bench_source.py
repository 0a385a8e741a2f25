"""What a measurement takes its settings from: a recipe or a file, by its bare name or as `--recipe` and `--config`."""

from __future__ import annotations

from pathlib import Path

from keyhole.config.file import recipes
from keyhole.errors import ConfigError
from keyhole.util.wording import nearest


def source_of(named: Path | None, recipe: str | None, file: Path | None, kinds: str) -> tuple[str | None, Path | None]:
    """The recipe and the settings file, where either is given.

    Args:
        named: the bare name.
        recipe: of `--recipe`.
        file: of `--config`.
        kinds: what the bare name may be, for the message.

    Raises:
        ConfigError: there is nothing of that name, or one is given twice.
    """
    if named is None:
        return recipe, file
    known = recipes()
    if str(named) in known:
        if recipe is not None:
            raise ConfigError(f"two recipes are given, {named} and --recipe {recipe}: leave one out")
        return str(named), file
    if not named.is_file():
        near = nearest(str(named), known)
        raise ConfigError(f"{named}: expected {kinds}, found nothing of that name{near}; recipes: {', '.join(known)}")
    if file is not None:
        raise ConfigError(f"two settings files are given, {named} and --config {file}: leave one out")
    return recipe, named
