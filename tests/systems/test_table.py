"""The table of systems is up to date, and every system has all that belongs to it."""

import pytest

from tests.systems.table import PAGE, ROOT, page, row, systems


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "Run `python -m tests.systems.table`."
    )


@pytest.mark.parametrize("stem", systems())
def test_files_of_a_system(stem):
    for path in (
        f"experiments/{stem}.py",
        f"tests/systems/test_{stem}.py",
        f"docs/systems/{stem}.md",
    ):
        assert (ROOT / path).is_file(), path
    text = (ROOT / f"docs/systems/{stem}.md").read_text(encoding="utf-8")
    assert f"::: mtjax.systems.{stem}" in text
    assert len((ROOT / f"experiments/{stem}.py").read_text().splitlines()) <= 250
    assert len(row(stem)[1].split()) <= 8
