"""A page of the report as a test sees it, and files of steps to make one of."""

import html.parser
import json


class Page(html.parser.HTMLParser):
    """The elements of a page: tags with attributes, texts outside scripts and styles, scripts."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.scripts, self._in = [], [], [], None
        self.feed(path.read_text(encoding="utf-8") if hasattr(path, "read_text") else path)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._in = tag
            self.scripts += [""] if tag == "script" else []

    def handle_endtag(self, tag):
        self._in = None if tag == self._in else self._in

    def handle_data(self, data):
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in is None:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] for tag, attributes in self.tags if tag == "section" and "id" in attributes]

    @property
    def figures(self) -> dict:
        def refuse(name):
            raise AssertionError(f"{name} is not JSON")

        return json.loads(self.scripts[1], parse_constant=refuse)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
