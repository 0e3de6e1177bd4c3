"""The example of docs/environments.md runs as it stands there."""

import contextlib
import io
import re
from pathlib import Path

from longrl.io.functions import resolve_function

DOCUMENT = Path(__file__).parents[2] / "docs" / "environments.md"


def test_the_environment_of_the_document_answers(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    file = tmp_path / "my_tools.py"
    file.write_text(blocks[0])
    make = resolve_function(f"{file}:Dictionary", "make", classes=True)
    assert make().tools[0]["function"]["description"] == "Says what a word means."
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(blocks[1], {"Dictionary": make})
    said = [line.partition("  # ")[2].partition(":")[0] for line in blocks[1].splitlines() if "print" in line]
    assert printed.getvalue().splitlines() == said
