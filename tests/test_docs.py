"""The documents are true: links lead somewhere, commands exist, the Python example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_command_shown_exists_with_its_options() -> None:
    from swifti2v.cli import app

    verbs = get_command(app).commands  # type: ignore[attr-defined]
    shown = [line for block in blocks(README, "bash") for line in block.splitlines()]
    calls = [re.search(r"swifti2v (\w+)(.*)", line.split("#")[0]) for line in shown]
    assert sum(call is not None for call in calls) >= 7
    for call in filter(None, calls):
        known = {name for parameter in verbs[call[1]].params for name in parameter.opts}
        assert set(re.findall(r"--[a-z0-9-]+", call[2])) <= known


def test_the_gate_runs_the_readmes_test_command() -> None:
    command = next(block.strip() for block in blocks(README, "bash") if "pytest" in block)
    assert command in (ROOT / ".ci" / "run").read_text()


def test_the_python_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = blocks(README, "python")
    scope: dict[str, object] = {}
    exec(example, scope)
    assert scope["frames"].shape == (1, 9, 128, 192, 3)  # type: ignore[attr-defined]


def test_decisions_are_short_and_numbered() -> None:
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [path.name[:4] for path in decisions] == [f"{n:04d}" for n in range(1, len(decisions) + 1)]
    assert all(len(path.read_text().splitlines()) <= 40 for path in decisions)
