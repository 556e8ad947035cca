"""The README is true: its example runs, its commands exist, its recipe table is complete."""

from __future__ import annotations

import re
from pathlib import Path

from halo_train import RECIPES, HaloLinear

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    namespace: dict = {}
    exec(compile(example, "README.md", "exec"), namespace)
    out = capsys.readouterr().out
    assert "2 linear layers run fp8" in out
    assert re.search(r"'0': '\d\d dB', '2': '\d\d dB'", out)
    assert not any(isinstance(m, HaloLinear) for m in namespace["model"].modules())


def test_every_make_target_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / ".ci/run").read_text()):
        assert set(re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets


def test_every_recipe_is_in_the_table():
    rows = {
        name
        for line in README.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert rows == set(RECIPES)


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
