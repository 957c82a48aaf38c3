import re
from pathlib import Path

import pytest

from torch_secorder import __all__, plotting, pruning, quantization

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_snippets_run_in_their_order():
    snippets = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert len(snippets) >= 3
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, snippet in enumerate(snippets, start=1):
        exec(compile(snippet, f"README.md, snippet {number}", "exec"), namespace)


def test_commands_are_targets_of_the_makefile():
    commands = re.findall(r"(?:^|`)make ([\w-]+)", README, flags=re.MULTILINE)
    assert {"demo", "test", "bench"} <= set(commands)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE), command


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_what_it_costs_is_what_the_page_says():
    page = (ROOT / "docs" / "concepts" / "performance.rst").read_text(encoding="utf-8")
    rows = re.findall(r"^   \* - (\S.*)\n((?:     - .*\n)+)", page.partition("Other packages")[0], flags=re.MULTILINE)
    columns = {label.split()[0]: re.findall(r"- ([\d.]+|\S+)", cells) for label, cells in rows}
    for name, label in {"MLP": "MLP", "ResNet-18": "ResNet-18", "GPT-2": "GPT-2-like,", "BERT": "BERT-like"}.items():
        _, _, _, in_a_loop, functional, *_ = columns[label]
        told = re.search(rf"^\| {name}\b[^|]*\| ([\d.]+) \| ([\d.]+) \|$", README, flags=re.MULTILINE)
        assert told is not None
        assert list(told.groups()) == [in_a_loop, functional], name


@pytest.mark.parametrize("name", [*__all__, *plotting.__all__, *pruning.__all__, *quantization.__all__])
def test_public_names_are_in_the_reference(name):
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.rst"))
    assert re.search(rf"(:members:|autofunction::|autoclass::)[^\n]*\b{name}\b", pages)


def test_what_the_quick_start_prints_is_what_it_says(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    snippet, printed = re.search(r"^```python\n(.*?)^```\n\n```\n(.*?)^```", README, re.MULTILINE | re.DOTALL).groups()
    exec(compile(snippet, "README.md, quick start", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out == printed


def test_it_is_read_in_a_few_minutes():
    assert len(README.split()) <= 900
