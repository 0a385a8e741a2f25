"""Configuration: what goes out comes back, and every mistake is one line that names it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from keyhole.config.base import Bytes, Contradiction, Portion, Settings
from keyhole.config.file import (
    dump_config,
    leaves,
    load_config,
    recipes,
    resolve,
)
from keyhole.config.settings import (
    Config,
    DataConfig,
    ModelConfig,
    PatchConfig,
    RunConfig,
    TrainConfig,
    _device,
)
from keyhole.data.item import Item
from keyhole.data.manifest import Manifest
from keyhole.errors import ConfigError
from keyhole.images import Size
from keyhole.tasks.kinds import Task
from keyhole.tools.init import Measured, propose

# --- any configuration, made from the types of the dataclasses -------------------------------------------------------

# Words that YAML 1.1 or Python would read as something else, and characters that need quotes.
AWKWARD = [
    "no",
    "null",
    "~",
    "1e3",
    "1e-3",
    "12:30",
    "2025-01-01",
    "007",
    "-",
    "a: b",
    "#x",
    "'",
    '"',
    "é",
    "🔬",
    " a ",
    "",
]
TEXT = st.one_of(st.sampled_from(AWKWARD), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))


def values(kind: Any) -> st.SearchStrategy[Any]:
    inner = [arg for arg in get_args(kind) if arg is not type(None)]
    if type(None) in get_args(kind):
        return st.none() | values(inner[0])
    if get_origin(kind) is tuple:
        return st.lists(values(inner[0]), max_size=3).map(tuple)
    if hasattr(kind, "__metadata__"):
        return limited(kind.__origin__, kind.__metadata__)
    if get_origin(kind) in (Union, UnionType):  # a number or `auto`
        return st.one_of([values(arg) for arg in inner])
    if inner:
        return st.sampled_from(inner)
    return {bool: st.booleans(), str: TEXT, Path: TEXT.map(Path), Bytes: st.integers(1, 10**15).map(Bytes)}[kind]


def limited(kind: Any, rules: Sequence[Any]) -> st.SearchStrategy[Any]:
    """Values of a type with limits, or of those that a check lets through."""
    limits = {name: getattr(rule, name) for rule in rules for name in ("gt", "ge", "lt", "le") if hasattr(rule, name)}
    if kind is float:
        high = limits.get("le", limits.get("lt", 1e30))
        return st.floats(0, high, exclude_min="gt" in limits, exclude_max="lt" in limits)
    if kind is int:
        return st.integers(1 if "gt" in limits else 0, 10**12)
    if kind is Portion:
        return st.floats(0, 1).map(Portion)
    if kind is str:
        is_device = any(getattr(rule, "func", None) is _device for rule in rules)
        return st.sampled_from(["auto", "cpu", "cuda:1"]) if is_device else TEXT.filter(str.strip)
    return values(kind)


def configs(kind: type[Settings] = Config) -> st.SearchStrategy[Any]:
    """Any settings, of which each is valid by itself."""

    def fields(kind: type[Settings]) -> st.SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries(
            {
                name: fields(info.annotation)
                if isinstance(info.annotation, type) and issubclass(info.annotation, Settings)
                else values(info.rebuild_annotation())
                for name, info in kind.model_fields.items()
            }
        )

    return fields(kind)


@settings(deadline=None, max_examples=150)
@given(given=configs(), comments=st.booleans())
def test_what_is_dumped_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, given: dict[str, Any], comments: bool
) -> None:
    file = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    try:
        config = Config(**given)
    except Contradiction:
        reject()
    file.write_text(dump_config(config, comments), encoding="utf-8")
    assert load_config(file) == config


def test_the_defaults_are_valid_and_come_from_an_empty_file(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    for text in ("", "# nothing\n", "patch:\n  # size: 3\n", "{}"):
        file.write_text(text)
        assert load_config(file) == Config()


def test_a_commented_dump_gives_the_reason_of_every_option_and_the_notes() -> None:
    text = dump_config(Config(), comments=True, notes={"patch.size": "measured so"})
    lines = text.splitlines()
    for path, _ in leaves(Config()):
        key = path.rpartition(".")[2]
        at = [number for number, line in enumerate(lines) if line.strip().startswith(f"{key}:")]
        assert at, path
        assert all(lines[number - 1].strip().startswith("#") for number in at), path
    assert "  # -> measured so\n  size: 224\n" in text
    assert yaml.safe_load(text)["patch"] == {
        "size": 224, "stride": None, "level": None, "mpp": None, "bits": None, "foreground": "all",
        "min_foreground": 0.01, "edge": "auto",
    }  # fmt: skip


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    assert recipes()[name]
    assert resolve(name) != Config()


def test_published_recipes_have_the_settings_of_the_paper() -> None:
    traffic, mnist = resolve("traffic"), resolve("megapixel-mnist")
    assert (traffic.patch.size, traffic.patch.stride, traffic.select.m, traffic.select.chunk) == (100, None, 10, 32)
    assert (traffic.model.encoder, traffic.model.stages, traffic.model.hidden) == ("resnet18", None, 2048)
    assert (traffic.train.lr, traffic.train.weight_decay, traffic.train.epochs, traffic.train.warmup) == (
        3e-4,
        0.1,
        150,
        10,
    )
    assert (mnist.patch.size, mnist.select.m, mnist.select.chunk, mnist.model.stages) == (50, 100, 100, 2)
    assert (mnist.model.position, mnist.model.channels, mnist.train.lr) == ("1d", 1, 1e-3)
    assert {traffic.train.batch, mnist.train.batch} == {16}
    assert {traffic.select.rule, mnist.select.rule} == {"streaming"}


BAD = {
    "unknown section": ("patches:\n  size: 3", ["unknown key `patches`", "`patch`"]),
    "unknown key": ("patch:\n  siz: 3", ["unknown key `patch.siz`", "`patch.size`"]),
    "unknown key that nothing is near": ("zzzzzzzz: 3", ["unknown key `zzzzzzzz`"]),
    "dash for underscore": ("data: {on-bad-image: skip}", ["`data.on_bad_image`"]),
    "text for a number": ("patch: {size: '3'}", ["patch.size: expected a whole number, got '3' (text)"]),
    "truth for a number": ("patch: {size: true}", ["patch.size: expected a whole number, got true"]),
    "truth for a choice": ("model: {channels: true}", ["model.channels: expected a whole number, got true"]),
    "fraction for a whole number": ("train: {epochs: 1.5}", ["train.epochs", "got 1.5"]),
    "list for a number": ("train: {lr: [1]}", ["train.lr", "got the list"]),
    "number for truth": ("model: {freeze: 1}", ["model.freeze: expected true or false, got 1"]),
    "number for text": ("model: {encoder: 3}", ["model.encoder: expected text, got 3"]),
    "text for a list": ("data: {tasks: a}", ["data.tasks: expected a list, got 'a'"]),
    "wrong entry of a list": ("run: {log: [tb]}", ["run.log", "'tensorboard' or 'wandb'", "'tb'"]),
    "wrong choice": ("select: {rule: globall}", ["select.rule: expected 'global' or 'streaming', got 'globall'"]),
    "value for a section": ("patch: 3", ["patch: expected a section of settings, got 3"]),
    "section for a value": ("patch: {size: {a: 1}}", ["patch.size", "got a section"]),
    "too small": ("patch: {size: 0}", ["patch.size: expected a number greater than 0, got 0"]),
    "too large": ("data: {val: 1}", ["data.val: expected a number less than 1, got 1"]),
    "not a number": ("train: {lr: .nan}", ["train.lr", "got nan"]),
    "infinite": ("train: {lr: .inf}", ["train.lr", "finite number, or 'auto', got inf"]),
    "clock time is no number": ("train: {lr: 12:30}", ["train.lr", "'12:30' (text)"]),
    "octal is no number": ("train: {epochs: 010}", ["train.epochs", "'010' (text)"]),
    "zero byte": ('data: {path: "a\\0b"}', ["data.path", "zero byte"]),
    "key twice": ("patch:\n  size: 3\n  size: 4", ["line 3", "'size' is there twice"]),
    "section twice": ("patch: {size: 3}\npatch: {size: 4}", ["line 2", "'patch' is there twice"]),
    "alias": ("data: {tasks: &a [x]}\nrun: {log: *a}", ["line 2", "aliases"]),
    "broken YAML": ("patch: {size: 3", ["not valid YAML"]),
    "endless nesting": ("[" * 3000, ["nested too deeply"]),
    "python object": ("!!python/object/apply:os.getcwd []", ["not valid YAML"]),
    "list at the top": ("- a", ["expected sections such as `patch:`, got the list"]),
    "key that is a list": ("? [a]\n: 3", ["not valid YAML"]),
    "key that is a number": ("1: 3", ["unknown key `1`"]),
    "level and mpp": ("patch: {level: 0, mpp: 0.5}", ["patch.level (=0)", "patch.mpp (=0.5)", "exclude"]),
    "nothing to learn from": ("data: {val: 0.5, test: 0.5}", ["data.val (=0.5)", "data.test (=0.5)", "below 1"]),
    "unknown device": ("run: {device: gpu}", ["run.device: expected auto, cpu, cuda", "'gpu'"]),
    "no encoder": ("model: {encoder: ''}", ["model.encoder: expected"]),
    "pretrained small": ("model: {encoder: small, pretrained: true}", ["model.pretrained", "`small` has no pretrained weights"]),
    "two sources of weights": (
        "model: {encoder: resnet18, pretrained: true, weights: a.safetensors}",
        ["model.pretrained and model.weights exclude"],
    ),
    "warm-up too long": ("train: {epochs: 5, warmup: 6}", ["train.warmup (=6)", "train.epochs (=5)"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_in_a_file_is_one_line_that_names_file_key_and_value(case: str, tmp_path: Path) -> None:
    text, parts = BAD[case]
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert message.count(str(file)) == 1
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_file_that_is_no_configuration_is_one_line(tmp_path: Path) -> None:
    binary, large = tmp_path / "b.yaml", tmp_path / "l.yaml"
    binary.write_bytes(b"\x89PNG\xff\xfe")
    large.write_bytes(b"#" * 1_000_001)
    for path, part in (
        (binary, "not text"),
        (large, "1,000,001 bytes"),
        (tmp_path, "not a file"),
        (tmp_path / "x", "no such"),
    ):
        with pytest.raises(ConfigError, match=part):
            load_config(path)


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for text, value in (("1e-3", 1e-3), ("1E-3", 1e-3), ("1", 1.0), ("5.e-1", 0.5), (".5", 0.5), ("+2.5", 2.5)):
        file.write_text(f"train: {{lr: {text}}}")
        assert load_config(file).train.lr == value


def test_values_from_python_are_checked_too() -> None:
    wrong: list[tuple[type[Settings], dict[str, Any]]] = [
        (PatchConfig, {"size": -1}),
        (PatchConfig, {"size": "3"}),
        (DataConfig, {"path": "a\0b"}),
        (ModelConfig, {"channels": 2}),
        (TrainConfig, {"lr": float("nan")}),
        (Config, {"memory": 5}),
    ]
    for kind, values in wrong:
        with pytest.raises(ConfigError):
            kind(**values)
        with pytest.raises(ConfigError):
            kind().replace(**values)


def test_values_that_exclude_each_other_are_named_as_settings() -> None:
    with pytest.raises(ConfigError, match=r"^train\.warmup \(=2\) must not exceed train\.epochs"):
        TrainConfig(epochs=1, warmup=2.0)
    with pytest.raises(ConfigError, match=r"^run\.save_minutes: expected a number greater than 0, got 0"):
        RunConfig(save_minutes=0)


def test_amounts_are_parsed_where_they_enter_and_written_as_text() -> None:
    config = Config(memory="1.5GB", unreadable="0.5 %")
    assert (config.memory, config.unreadable) == (1_500_000_000, 0.005)
    assert config.replace(patch={"size": 3}).memory == config.memory
    assert dump_config(config).splitlines()[1:3] == ["memory: 1500MB", "unreadable: 0.5%"]


# --- keyhole init ----------------------------------------------------------------------------------------------------


@st.composite
def measurements(draw: st.DrawFn) -> Measured:
    side = st.integers(1, 100_000)
    sizes = draw(st.lists(st.builds(Size, side, side), min_size=1, max_size=5))
    mpp = draw(st.lists(st.floats(0.1, 2), min_size=len(sizes), max_size=len(sizes)) | st.just([None] * len(sizes)))
    counts = draw(st.tuples(st.integers(1, 300), st.integers(1, 300)))
    items = [
        Item(f"{label}{number}", Path(f"{label}{number}"), {"label": label}, "train")
        for label, count in zip("ab", counts, strict=True)
        for number in range(count)
    ]
    manifest = Manifest(tuple(items), (Task("label", "binary", ("a", "b")),))
    return Measured(manifest, tuple(sizes), tuple(mpp), grey=draw(st.booleans()), pyramids=draw(st.booleans()))


@settings(deadline=None, max_examples=60)
@given(measurements(), st.sampled_from(["lite0", "small", "resnet18"]))
def test_what_init_proposes_is_valid_fits_every_image_and_is_explained(measured: Measured, encoder: str) -> None:
    asked = Config(model={"encoder": encoder})
    proposal = propose(asked, measured)
    config = proposal.config
    for size, mpp in zip(measured.sizes, measured.mpp, strict=True):
        scale = mpp / config.patch.mpp if config.patch.mpp is not None and mpp is not None else 1.0
        assert scale <= 1.001  # never enlarged
        assert config.patch.size <= max(1, min(size) * scale)
    assert config.model.channels == (1 if measured.grey else 3)
    assert (config.model.stages == 1) == (encoder == "small" and measured.pyramids), "only ours is cut"
    smaller, larger = sorted(len([i for i in measured.manifest.items if i.labels["label"] == c]) for c in "ab")
    assert config.train.balance == ("loss" if larger >= 2 * smaller else "none")
    defaults = dict(leaves(asked))
    changed = {path for path, value in leaves(config) if value != defaults[path]}
    assert changed <= {*proposal.reasons, "train.warmup"}


def test_settings_given_in_python_are_checked_like_those_in_a_file() -> None:
    config = Config().replace(patch={"size": 50}, data={"tasks": ["a"], "path": "d.csv"}, run=RunConfig(ahead=2))
    assert (config.patch.size, config.data.tasks, config.data.path, config.run.ahead) == (50, ("a",), Path("d.csv"), 2)
    for wrong, message in (
        ({"patch": {"siz": 50}}, r"unknown key `patch\.siz` \(did you mean `patch\.size`\?\)"),
        ({"epochs": 3}, "unknown key `epochs`"),
        ({"patch": 50}, "patch: expected a section of settings"),
        ({"patch": {"size": "50"}}, r"patch\.size: expected a whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            Config().replace(**wrong)
