from pathlib import Path

from elute.cli.document import document

PAGE = Path(__file__).parent.parent.parent / "docs" / "cli.md"


def test_cli_page_is_what_the_commands_say():
    assert PAGE.read_text() == document(), "run: python -m elute.cli.document > docs/cli.md"
