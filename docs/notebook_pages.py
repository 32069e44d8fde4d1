"""The notebooks as pages of the site, with what they printed and drew."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

FOLDER = Path(__file__).parent / "notebooks"


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Called by mkdocs with the files of the site."""
    for notebook in sorted(FOLDER.glob("*.ipynb")):
        name = f"notebooks/{notebook.stem}.md"
        files.append(File.generated(config, name, content=page(notebook)))
    return files


def page(notebook: Path) -> str:
    """The Markdown of a notebook."""
    parts = []
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif not source.startswith("%matplotlib"):
            parts.append(f"```python\n{source}\n```")
            parts += [shown(output) for output in cell["outputs"]]
    return "\n\n".join(part for part in parts if part) + "\n"


def shown(output: dict[str, Any]) -> str:
    """Markdown of one output: its picture, its HTML, or else its text."""
    data = output.get("data", {})
    if "image/png" in data:
        image = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="Picture drawn by the cell" src="data:image/png;base64,{image}">'
    if "text/html" in data:
        # Markdown ends a block of HTML at a blank line.
        return re.sub(r"\n\s*\n", "\n", "".join(data["text/html"])).strip()
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""
