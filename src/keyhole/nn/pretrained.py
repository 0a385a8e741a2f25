"""timm's pretrained weights: on this machine already, or within reach, or an error at once that says how to bring them.

The libraries beneath try again and again for a minute before they give up, each in words of its own. So one short
question goes ahead: is the file in the cache, and if not, does its server answer?
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyhole.errors import ConfigError

SECONDS = 10.0
"""Time that a server has to answer."""
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""Files of a model on the Hugging Face Hub, in the order that timm looks for them."""


@dataclass(frozen=True)
class Source:
    """Where timm takes the weights of a name from.

    Attributes:
        name: of the model.
        hub: repository on the Hugging Face Hub, empty where there is none.
        files: its files that will do.
        url: of a file elsewhere, where there is no repository.
        special: timm loads it in a way of its own.
    """

    name: str
    hub: str
    files: tuple[str, ...]
    url: str
    special: bool

    def failed(self, reason: object) -> ConfigError:
        """The error that says what to fetch and how to give it."""
        why = " ".join(str(reason).split()).rstrip(".") or type(reason).__name__
        where = f"{self.files[0]} of the repository {self.hub} on the Hugging Face Hub" if self.hub else self.url
        form = "" if self.hub else ", as safetensors"
        return ConfigError(
            f"--model.encoder {self.name}: its pretrained weights cannot be downloaded or loaded ({why[:200]}). "
            f"Fetch {where} where there is a network, and give it{form}: --model.weights FILE instead "
            "of --model.pretrained"
        )


def check_pretrained(name: str) -> dict[str, Any]:
    """Make sure that timm's weights of a name can be had, before anything waits for them.

    Args:
        name: of a timm model.

    Returns:
        What `timm.create_model` takes as `pretrained_cfg_overlay`: the file in the cache where there is one, so that no
        network is needed.

    Raises:
        ConfigError: timm has no weights for it, or they are not in the cache and their server does not give them.
    """
    source = _source(name)
    if source is None:
        return {}
    if source.hub:
        from huggingface_hub import try_to_load_from_cache

        repository, _, revision = source.hub.partition("@")
        for file in source.files:
            cached = try_to_load_from_cache(repository, file, revision=revision or None)
            if isinstance(cached, str):
                return {} if source.special else {"file": cached, "custom_load": False}
        _ask_hub(source, repository, revision or "main")
    elif not _in_torch_cache(source.url):
        _ask(source)
    return {}


@contextmanager
def pretrained_faults(name: str) -> Iterator[None]:
    """Whatever stops a download or breaks what came of it is a ConfigError.

    Args:
        name: of a timm model.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        source = _source(name)
        if source is None:  # a model of the user's own
            raise
        raise source.failed(error) from error


def _source(name: str) -> Source | None:
    """None for a model that is registered without a description of its weights: its own code knows.

    Raises:
        ConfigError: timm describes the model, and has no weights for it.
    """
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None:
        return None
    hub, url = config.hf_hub_id or "", config.url or ""
    if not hub and not url and not config.file and config.state_dict is None:
        base = name.partition(".")[0].split("_")[0]
        known = timm.list_pretrained(f"{base}*")[:3]
        hint = f"; it has some for {', '.join(known)}" if known else ""
        raise ConfigError(
            f"--model.encoder {name}: timm has no pretrained weights for it{hint}. Leave --model.pretrained off, or "
            "give your own: --model.weights FILE"
        )
    if not hub and not url:
        return None
    files = (config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES
    return Source(name, hub, files, url, special=isinstance(config.custom_load, str))


def _in_torch_cache(url: str) -> bool:
    import torch

    return (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file()


def _ask_hub(source: Source, repository: str, revision: str) -> None:
    """Raises unless one of the files is there for whoever asks; one question each, without trying again."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    status = 0
    for file in source.files:
        try:
            answer = get_session().head(
                hf_hub_url(repository, file, revision=revision), headers=build_hf_headers(), timeout=SECONDS
            )
        except Exception as error:  # each version of the library has its own kinds
            raise source.failed(error) from error
        status = answer.status_code
        if status < 400:
            return
    raise source.failed(f"the server answers {status}")


def _ask(source: Source) -> None:
    """Raises unless the server of the file answers."""
    from urllib.request import Request, urlopen

    try:
        urlopen(Request(source.url, method="HEAD"), timeout=SECONDS).close()
    except (OSError, ValueError) as error:
        raise source.failed(error) from error
