"""The page of the papers' rows is what the command writes."""

from speed_engine.reports import paper


def test_the_page_is_what_the_command_writes():
    page = paper.PAPERS / "README.md"
    assert page.read_text(encoding="utf-8") == paper.as_markdown() + "\n", (
        "write it anew: python -m speed_engine paper --markdown > speed_engine/papers/README.md"
    )


def test_every_row_is_on_the_page_once_and_what_is_known_against_it_above():
    above, below = paper.as_markdown().split("## All rows")
    for name, row in paper.rows().items():
        assert below.count(f"`{name}`") == 1
        assert above.count(f"`{name}`") == (1 if row.known else 0)
