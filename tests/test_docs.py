"""What the documentation says is true: its code runs, and what it names is there."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import test_structure as structure
import torch
from projects import Plain, Smooth, adaptive, loaders, make, trainer

import lightning_adalfl
from lightning_adalfl import AdaLFLConfig, AdaLFLMixin
from lightning_adalfl.__main__ import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")), *TEMPLATES]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Block by block, in order; the README's has the reader's own module and loaders."""
    monkeypatch.chdir(tmp_path)
    train, trusted = loaders()
    namespace: dict[str, object] = {"__name__": "__main__", "LitModel": Plain, "train": train, "trusted": trusted}
    with warnings.catch_warnings():
        # Advice about workers and log intervals is Lightning's to give for pages as small as these.
        warnings.filterwarnings("ignore", module="lightning")
        for number, block in enumerate(BLOCK.findall(page.read_text()), start=1):
            exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)
    if page.name == "tutorial.md":  # which says what it prints
        printed = capsys.readouterr().out
        own, learned = re.findall(r"own loss ([\d.]+), with a learned shape ([\d.]+)", printed)[0]
        assert float(learned) < 0.01
        assert round(float(own), 1) == 0.5
        assert int(re.findall(r"(\d+)% of the 100 worst are wrong", printed)[0]) >= 90
    if page.name == "recipes.md":
        made = [value for value in namespace.values() if isinstance(value, AdaLFLMixin)]
        assert len(made) == page.read_text().count("\n## ") == 10
        assert all(module.adalfl.meta_steps > 0 and not module.adalfl.skipped for module in made)


def test_the_readme_and_the_tutorial_have_code() -> None:
    assert {"README.md", "tutorial.md"} <= {page.name for page in WITH_CODE}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 700


LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]


def anchors(page: Path) -> set[str]:
    """Return what a heading of a page is called in a link, as GitHub and the site call it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", title)).lower().replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_to_a_heading_of_it(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", target):
            assert re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/[\w\-./%?=&#:]*)?|mailto:[\w.]+@[\w.]+", target), target
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}"


def test_a_heading_is_called_as_in_a_link(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# What is `h`, and why?\n```bash\n# no heading\n```\n## Moving [from 0.1](a.md)\n")
    assert anchors(page) == {"what-is-h-and-why", "moving-from-01"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_and_commands_that_a_page_names_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text()
    for path in re.findall(r"`?(examples/[\w/]+(?:\.(?:py|ipynb))?)", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for command in set(re.findall(r"python -m lightning_adalfl (\w+)", text)):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0, f"{page.name} names the command {command}"


def named_tests(text: str) -> Iterator[tuple[str, str]]:
    """Yield the tests that a page names, as file and name; the name is empty where a file is named alone."""
    yield from re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    for file, name in named_tests(page.read_text()):
        path = ROOT / "tests" / file
        assert path.exists(), f"{page.name} names {file}"
        assert not name or re.search(rf"^(def|class) {name}\b", path.read_text(), re.MULTILINE), f"{file}::{name}"


def test_the_figures_of_the_readme_are_those_of_the_comparison() -> None:
    table = (DOCS / "contaminated.md").read_text().split("<!-- regret 0.05 -->")[1].split("<!-- end of")[0]
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| ([\d.]+) / ([\d.]+) \| ([\d.]+) / ([\d.]+) \|$", table, re.MULTILINE)
    known = {name: values for name, *values in rows}
    readme = (ROOT / "README.md").read_text().split("## What is it worth?")[1].split("\n## ")[0]
    said = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|$", readme, re.MULTILINE)
    assert len(said) == 6
    for name, *values in said:
        assert known[name][2:] == values, name
    text = " ".join(readme.split())
    for name, words in (
        ("robust loss, fine-tuned on trusted rows", "{} and {}"),
        ("the library's defaults", "library {} and {}"),
    ):
        assert words.format(*known[name][:2]) in text, name


def test_each_promise_names_the_test_that_holds_it() -> None:
    promises = (ROOT / "README.md").read_text().split("## Three promises")[1].split("\n## ")[0]
    assert len(list(named_tests(promises))) == len(re.findall(r"^\d\. ", promises, re.MULTILINE)) == 3


# The options.


def option_rows() -> list[list[str]]:
    table = (DOCS / "options.md").read_text().split("## Every field")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return rows[2:]


def test_the_options_are_the_fields_of_the_configuration() -> None:
    known = {f"`{f.name}`": "" if f.default is MISSING else f.default for f in fields(AdaLFLConfig)}
    rows = option_rows()
    assert [row[0] for row in rows] == list(known)
    for name, default, when in rows:
        assert (eval(default.strip("`")) if default else "") == known[name], name
        assert when.endswith("."), name


def test_the_changelog_and_the_page_on_moving_name_every_field_that_went() -> None:
    moving = (DOCS / "moving_from_0.1.md").read_text()
    for name in sorted(FIELDS_OF_0_1 - {f.name for f in fields(AdaLFLConfig)}):
        assert f"`{name}`" in CHANGELOG, name
        assert f"`{name}`" in moving, name


FIELDS_OF_0_1 = {
    *("task", "task_loss", "representation", "output_activation", "bias", "weight_init", "reduction", "residual"),
    *("initial_loss", "meta_lr", "lr_meta_lr", "meta_optimizer", "meta_every", "meta_data", "meta_batch_size"),
    *("base_fraction", "hypergradient", "max_gain", "min_cosine", "gain_lr", "gain_horizon", "safeguard"),
    *("safeguard_window", "learn", "online"),
}


def test_the_pages_say_what_public_names_there_are() -> None:
    api = (DOCS / "api.md").read_text()
    for name in lightning_adalfl.__all__:
        assert re.search(rf"^\.\. auto(class|function):: {name}$", api, re.MULTILINE), name


# The refusals.


def source() -> str:
    """Return the source of the package, with string literals that stand one after another joined."""
    text = "\n".join(path.read_text() for path in structure.FILES)
    return re.sub(r"\s+", " ", re.sub(r'"\s*(?:\+\s*_REMEDY[^\n]*)?\n\s*f?"', "", text))


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_package() -> None:
    known = source()
    quoted = re.findall(r"^### “(.*)”$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) >= 25
    for message in quoted:
        for part in message.split("…"):  # what depends on the case
            assert part.strip(" .") in known, message


# The architecture.


def walk() -> list[tuple[str, str]]:
    """Return the files and functions of the walk, in its order."""
    text = (DOCS / "architecture.md").read_text().split("## One training step")[1].split("\n## ")[0]
    return re.findall(r"^\| [^|]*\| `([\w/]+)` \| `(\w+)` \|", text, re.MULTILINE)


def test_the_files_that_the_architecture_names_exist() -> None:
    text = (DOCS / "architecture.md").read_text()
    named = set(re.findall(r"`((?:adapter|callbacks|inspection|learning|losses)/\w+)(?:\.py)?`", text))
    named |= {"/".join(name.split(".")) for name in re.findall(r"`(\w+)\.py`", text)}
    assert named
    for name in named:
        assert (structure.PACKAGE / f"{name}.py").exists(), name


def test_every_room_is_in_the_picture_and_in_the_table_with_the_arrows_that_the_code_has() -> None:
    text = (DOCS / "architecture.md").read_text().split("## The rooms")[1].split("\n## ")[0]
    picture = text.split("```text\n")[1].split("```")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\w, ]+) \|$", text, re.MULTILINE)
    assert [name for name, _ in rows] == structure.ROOMS
    said = {(name, other) for name, others in rows[1:] for other in others.split(", ") if others != "nothing"}
    room = structure.room
    found = {(room(a), room(b)) for a, others in structure.GRAPH.items() for b in others if room(a) != room(b)}
    assert said == {(a, b) for a, b in found if a != "__init__"}
    for name in structure.ROOMS[1:]:
        assert re.search(rf"\b{name}\b", picture), name


class WithAdam(Smooth):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def test_the_walk_is_that_of_a_default_step(tmp_path: Any) -> None:
    """The functions of the page are called in its order by a step that a meta step follows."""
    called: list[tuple[str, str]] = []

    def trace(frame: Any, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and structure.PACKAGE in path.parents:
            called.append((str(path.relative_to(structure.PACKAGE).with_suffix("")), frame.f_code.co_name))

    class Follow(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 19:
                sys.setprofile(trace)

        def on_train_batch_end(self, *_: Any) -> None:
            sys.setprofile(None)

    module = make(adaptive(WithAdam), adalfl=AdaLFLConfig("multiclass"))
    trainer(tmp_path, max_epochs=-1, max_steps=20, callbacks=[Follow()]).fit(module, *loaders())
    assert module.adalfl.meta_steps == 2
    position = 0
    for visit in walk():
        assert visit in called[position:], f"{visit} is not called, or before the one above it"
        position = called.index(visit, position) + 1
    assert position


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "tutorial.html").exists()
