"""Start a model from what a run has learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from keyhole.config.settings import Config, ModelConfig
from keyhole.errors import ConfigError, RunError
from keyhole.nn.classifier import IPSClassifier
from keyhole.nn.encoder import PixelEncoder
from keyhole.nn.weights import misfits, weights_digest
from keyhole.patches.features import learned_origin, patches_in_words
from keyhole.runs.checkpoint import PROJECTOR, read_info, read_tensors, weights_file
from keyhole.tasks.kinds import Task
from keyhole.util.version import VERSION

ENCODER = "encoder."
"""What the names of an encoder's weights begin with in a model."""


def load_start(model: IPSClassifier, tasks: Sequence[Task], path: Path) -> None:
    """Load the best model of a run into a new one (`--model.start`).

    Args:
        model: the new model, its encoder with the weights that its settings ask for.
        tasks: of the new model.
        path: a run, the folder of a model or its file.

    Raises:
        RunError: the run had other tasks, or another model; or it learned from features of another encoder.
    """
    file = weights_file(path)
    weights, info = read_tensors(file)
    try:
        learned, settings = [Task.from_json(each) for each in info["tasks"]], ModelConfig(**info["model"])
    except (KeyError, ConfigError) as error:
        raise RunError(f"{file}: its description does not fit keyhole {VERSION} ({error}).") from error
    _check_tasks(file, learned, tasks)
    state = model.state_dict()
    if settings.feature_width is None and not isinstance(model.encoder, PixelEncoder):
        raise RunError(f"{file}: learned from images, and the data here are stored features. Give a run on features.")
    if settings.feature_width is not None and isinstance(model.encoder, PixelEncoder):
        weights = _behind_encoder(file, model.encoder, weights, settings)
        state = {name: weight for name, weight in state.items() if _learned_from_features(name)}
    problems = misfits(state, weights)
    if settings.heads != model.pool.heads:  # whose weights have the same shapes
        problems.append(f"it has {settings.heads} heads, expected {model.pool.heads}")
    if problems:
        count = f" ({len(problems)} weights in all)" if len(problems) > 3 else ""
        names = ("encoder", "channels", "width", "stages", "projector", "dim", "heads", "hidden", "position")
        given = {name: value for name in names if (value := getattr(settings, name)) is not None}
        flags = " ".join(f"--model.{name} {value}" for name, value in given.items())
        raise RunError(f"{file}: its model is another one: {'; '.join(problems[:3])}{count}. It has {flags}.")
    model.load_state_dict(weights, strict=False)  # what is missing was looked at


def doubt_of_start(config: Config) -> list[str]:
    """Return a line if the model that a run starts from learned from other patches than the run's; else none.

    Raises:
        RunError: there is no such model.
    """
    if config.model.start is None:
        return []
    file = weights_file(config.model.start)
    info = read_info(file)
    learned = info["model"].get("feature_patches") or _described(info.get("patch", {}))
    here = config.model.feature_patches or _described(config.patch.model_dump())
    if None in (learned, here) or learned == here:
        return []
    return [
        f"warning: {file}: learned from patches of {learned}, and here they are of {here}. What it learned "
        "to keep may not hold for these: give the same --patch.size and other settings of patches."
    ]


def _described(patch: Mapping[str, Any]) -> str | None:
    return patches_in_words({f"patch.{name}": value for name, value in patch.items()})


def _check_tasks(file: Path, learned: Sequence[Task], tasks: Sequence[Task]) -> None:
    """Raise RunError unless the tasks have the same names, kinds and classes."""
    then, now = (
        [f"{task.name} ({task.kind}: {', '.join(task.classes)})" for task in each] for each in (learned, tasks)
    )
    if then != now:
        raise RunError(
            f"{file}: learned {'; '.join(then)}, and the tasks here are {'; '.join(now)}. Give the same, with "
            "--data.tasks and the same labels; for other tasks --model.weights takes a run's encoder alone."
        )


def _behind_encoder(
    file: Path, encoder: PixelEncoder, weights: Mapping[str, Tensor], settings: ModelConfig
) -> dict[str, Tensor]:
    """Return weights of a model of stored features under their names behind an encoder, which must have made them."""
    origin = learned_origin(settings)
    if origin.weights is None:
        raise RunError(
            f"{file}: learned from features that do not state the weights of their encoder, so that nothing shows "
            "whether it is the one here. Make them with keyhole embed and train on them again."
        )
    own = {name: weight for name, weight in encoder.state_dict().items() if not name.startswith(PROJECTOR)}
    if weights_digest(own) != origin.weights:
        raise RunError(
            f"{file}: learned from features of {origin.describe()}, which is not the encoder here. Give the one that "
            "keyhole embed was given, with its weights and channels (--model.encoder, --model.channels, "
            "--model.pretrained or --model.weights)."
        )
    if encoder.projector is None:
        raise RunError(
            f"{file}: learned from stored features, by a projector. Give this model one: --model.projector linear"
        )
    return {
        ENCODER + PROJECTOR + name.removeprefix(ENCODER) if name.startswith(ENCODER) else name: weight
        for name, weight in weights.items()
    }


def _learned_from_features(name: str) -> bool:
    """Return whether a weight of a model of images is one that a model of stored features has as well."""
    return not name.startswith(ENCODER) or name.startswith(ENCODER + PROJECTOR)
