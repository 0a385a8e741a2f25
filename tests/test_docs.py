"""What the documents say is so: their code runs, their links lead somewhere, the files they name exist."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import write_toy
from safetensors import safe_open

from keyhole.cli.main import VERBS, module_of
from keyhole.cli.options import Options, flags_of, parse
from keyhole.config.file import leaves, recipes
from keyhole.config.settings import Config
from keyhole.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
GROUPS = {verb.partition(" ")[0] for verb in VERBS if " " in verb}
PERFORMANCE = ROOT / "docs" / "performance.md"
LONG = '"epochs": 30'  # what a reader should type, and a test has no time for


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(document: str) -> list[str]:
    """The Python blocks of a document."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def run(blocks: list[str], where: str) -> dict[str, Any]:
    """Runs blocks one after the other in one namespace, as a reader would, but for one epoch."""
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block.replace(LONG, '"epochs": 1'), f"{where}, block {number}", "exec"), space)
    return space


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder: `photos` with two classes in it."""
    monkeypatch.chdir(tmp_path)
    write_toy(tmp_path / "photos", count=8, side=96)
    return tmp_path


@pytest.mark.usefixtures("photos")
def test_the_python_of_the_readme_is_the_example_in_ten_lines_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = code("README.md")
    example = (ROOT / "examples" / "ten_lines.py").read_text()
    assert [line.split() for line in block.splitlines()] == [line.split() for line in example.splitlines()[2:]]
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 10
    run([block], "README.md")
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.usefixtures("photos")
def test_the_python_api_runs_as_written() -> None:
    blocks = [block for block in code("docs/python-api.md") if "from_reference" not in block]
    assert len(blocks) >= 8
    space = run(blocks, "docs/python-api.md")
    assert sorted(path.name for path in Path("answers").iterdir()) == [f"{n}.png" for n in range(8)]
    assert space["selection"].index.shape == (2, 8)
    assert space["logits"]["kind"].shape == (2, 4)
    assert torch.isclose(torch.as_tensor(space["prediction"].kept.attention["label"].sum()), torch.tensor(1.0))


def test_published_weights_are_loaded_as_written(photos: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with safe_open(shared / "golden" / "images.safetensors", "pt") as file:
        state = {key.removeprefix("weight."): file.get_tensor(key) for key in file.keys() if key.startswith("weight.")}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    torch.save(state, photos / "published.pt")
    (photos / "published.yml").write_text(yaml.safe_dump(config))
    (block,) = [block for block in code("docs/python-api.md") if "from_reference" in block]
    space = run(["import torch\nfrom pathlib import Path\n", block], "docs/python-api.md")
    assert not space["model"].training


@pytest.mark.usefixtures("photos")
def test_adding_an_encoder_runs_as_written() -> None:
    space = run(code("docs/adding-an-encoder.md"), "docs/adding-an-encoder.md")
    assert space["loss"].isfinite()
    assert space["prediction"].scores.map().shape == (3, 3)
    assert {path.name for path in Path("runs").iterdir()} == {"atto", "own", "frozen"}


def test_the_example_of_modules_finds_what_decides(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "modules.py"))
    assert example["main"](80) >= 0.9
    kept = re.search(r"the patch with the bar was kept in (\d\.\d\d) of them", capsys.readouterr().out)
    assert kept is not None
    assert float(kept[1]) >= 0.9


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_link_leads_to_a_file(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    missing = [
        link
        for link in links
        if "://" not in link and not (document.parent / link.partition("#")[0]).resolve().exists()
    ]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_file_of_the_package_and_every_test_that_is_named_exists(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    named = re.findall(r"`((?:[\w.-]+/)*\w+\.py)`(?! \(new\))", text)
    places = (ROOT, ROOT / "src" / "keyhole", ROOT / "tests", document.parent)
    assert not [file for file in named if not any((place / file).is_file() for place in places)]
    tests = re.findall(r"`(test_\w+)`", text)
    written = {
        found
        for path in (ROOT / "tests").glob("test_*.py")
        for found in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert not [test for test in tests if test not in written]


def tree() -> list[str]:
    """The folders of the package from top to bottom, as the contract of imports has them, and the errors."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    package = ROOT / "src" / "keyhole"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert folders == set(layers) - {"errors"}, "the contract of imports is not the tree"
    return [f"{name}/" if name in folders else f"{name}.py" for name in layers]


def test_the_table_of_folders_is_the_tree() -> None:
    rows = re.findall(r"^\| `([a-z]+(?:/|\.py))` \|", (ROOT / "docs" / "how-it-works.md").read_text(), re.MULTILINE)
    assert rows == tree()


def test_the_map_for_contributors_is_the_tree() -> None:
    block = re.search(r"^    src/keyhole/\n(.*?)\n\n", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    assert re.findall(r"^      (\S+)", block[1], re.MULTILINE) == tree()


def test_every_arrow_of_the_picture_is_a_folder_of_the_tree() -> None:
    arrows = set(re.findall(r"\b[a-z]+/(?=[ <:])", (ROOT / "docs" / "flow.svg").read_text()))
    assert len(arrows) >= 6
    assert arrows <= set(tree())


def test_the_picture_is_what_its_script_draws() -> None:
    assert runpy.run_path(str(ROOT / "docs" / "draw_flow.py"))["svg"]() == (ROOT / "docs" / "flow.svg").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_setting_that_is_named_exists(document: Path) -> None:
    known = {path for path, _ in leaves(Config())}
    sections = {path.partition(".")[0] for path in known if "." in path}
    pattern = rf"(?:--|`)((?:{'|'.join(sections)})\.[a-z][a-z_-]*)\b(?![.(])"
    used = {found.replace("-", "_").replace(".no_", ".") for found in re.findall(pattern, document.read_text())}
    files = {f"{section}.py" for section in sections}
    assert not used - known - files


def command_lines(text: str) -> Iterator[tuple[str, bool]]:
    """Every `keyhole ...` of a document, without comments and pipes; whether it is a line to type, not one in prose."""
    text = re.sub(r"\\\n\s*", "", text)
    for line in re.findall(r"^(?: {4}|```\w*\n)(?:\$ )?(?:\.venv/bin/)?keyhole (.*)$", text, re.MULTILINE):
        yield re.split(r"\s(?:#|\|)", line)[0].strip(), True
    for span in re.findall(r"`keyhole ([^`]+)`", text):
        yield " ".join(span.split()), False


def options_of(verb: str) -> type[Options]:
    """The model that a verb's options make."""
    module = import_module(module_of(verb))
    (kind,) = (
        found
        for name, found in vars(module).items()
        if name.endswith("Options") and found.__module__ == module.__name__
    )
    assert issubclass(kind, Options)
    return kind


def wrong_with(line: str, typed: bool) -> str | None:
    """What a command line has that keyhole does not know; nothing is run."""
    verb, *words = shlex.split(re.sub(r"[\[\]]|(?<=\w)\.\.\.", "", line))
    if verb == "VERB" or verb.startswith("--"):
        return None
    if verb in GROUPS and words and words[0] != "KIND" and not words[0].startswith("-"):
        verb, words = f"{verb} {words[0]}", words[1:]
    if verb not in (*GROUPS, *VERBS):
        return f"no verb {verb}"
    if "--help" in words or verb in GROUPS:
        return None
    try:
        recipe = parse(options_of(verb), words, f"keyhole {verb}").get("recipe")
    except ConfigError as error:
        return None if not typed and "is missing" in str(error) else str(error)
    return None if recipe in (None, "NAME", *recipes()) else f"no recipe {recipe}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_command_line_names_a_verb_options_and_values_that_exist(document: Path) -> None:
    lines = dict(command_lines(document.read_text()))
    found = {line: wrong for line, typed in lines.items() if (wrong := wrong_with(line, typed)) is not None}
    assert not found
    if document.name in ("README.md", "whole-slides.md", "command-line.md", "first-run.md"):
        assert len(lines) >= 5, "the lines are not recognised any more"


def test_a_command_line_that_would_not_work_is_found() -> None:
    text = "    keyhole train photos --patch.size 64  # typed\n\nand `keyhole predict RUN\n--out DIR`\n"
    assert dict(command_lines(text)) == {"train photos --patch.size 64": True, "predict RUN --out DIR": False}
    for line in (
        "trian photos",
        "train photos --patch.sise 64",
        "train photos --patch.size big",
        "train photos --recipe nothing",
        "evaluate",
        "data slide practice",
        "bench sped small",
    ):
        assert wrong_with(line, True), line
    assert wrong_with("evaluate", False) is None


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_option_that_is_named_by_itself_exists_for_some_verb(document: Path) -> None:
    known = {
        f"--{flag}" for verb in VERBS for each in flags_of(options_of(verb)) for flag in (each.name, each.pair)
    } | {
        "--help",
        "--help-all",
        "--debug",
        "--version",
        "--section.name",
    }
    named = set(re.findall(r"`(--[a-z][\w.-]*)[^`]*`", document.read_text()))
    assert not {flag for flag in named if flag.replace("_", "-") not in known}


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f"](docs/{page.name})" not in text]


def test_every_column_with_a_meaning_of_its_own_is_explained() -> None:
    from keyhole.data.read_csv import RESERVED

    text = (ROOT / "docs" / "data.md").read_text()
    assert not [column for column in RESERVED if not re.search(rf"^\|[^|]*`{column}`", text, re.MULTILINE)]


def test_every_recipe_is_in_the_list_of_recipes() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text()
    assert not [recipe for recipe in recipes() if f"| `{recipe}` |" not in text]


def test_the_command_line_page_names_every_verb() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text()
    assert not [verb for verb in VERBS if f"### `keyhole {verb}" not in text]


def test_the_changelog_has_the_version_of_the_package() -> None:
    import keyhole

    assert f"## {keyhole.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_measured_figure_of_the_page_on_performance_is_in_the_dated_file_that_its_row_links() -> None:
    rows = re.findall(r"^\|(.*)\|[^|]*\]\((\.\./benchmarks/[^)]+)\)[^|]*\|$", PERFORMANCE.read_text(), re.MULTILINE)
    assert len(rows) >= 5, "the rows are not recognised any more"
    for cells, link in rows:
        assert re.search(r"_\d{4}-\d{2}-\d{2}\.md$", link), link
        found = figures((PERFORMANCE.parent / link).read_text())
        measured = figures(cells.rpartition("|")[2])
        assert measured
        assert not measured - found, f"{cells.strip()}: not in {link}"


def figures(text: str) -> set[str]:
    """Numbers, without the dots and commas that end a clause."""
    return {each.rstrip(".,") for each in re.findall(r"\d[\d.,]*", text)}
