"""Text that is safe in a page: corpus text, run names and domains are hostile until they went through `escape`."""

import html
from collections.abc import Iterable


class Html(str):
    """Markup that is ready for the page. Plain strings are not: they go through `escape` first."""

    __slots__ = ()


def escape(text: object) -> Html:
    """The text as markup that shows it; Html passes unchanged."""
    return text if isinstance(text, Html) else Html(html.escape(str(text), quote=True))


def join(parts: Iterable[object], between: str = "") -> Html:
    """All parts one after the other, plain strings escaped."""
    return Html(between.join(escape(part) for part in parts))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """One element. Attributes: `class_` for class, `data_x` for data-x, True for a bare name, None for absent."""
    opened = "".join(_attribute(key, value) for key, value in attributes.items())
    return Html(f"<{name}{opened}>{join(content)}</{name}>")


def _attribute(key: str, value: object) -> str:
    key = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {key}" if value is True else f' {key}="{html.escape(str(value), quote=True)}"'


def visible(text: str) -> str:
    """The text with control and direction-changing characters replaced by symbols that can be seen."""
    return "".join(_VISIBLE.get(character, character) for character in text)


_VISIBLE = {chr(code): chr(0x2400 + code) for code in range(32)} | {
    "\n": "⏎",
    "\t": "⇥",
    " ": "␣",
    "\x7f": "␡",
    **dict.fromkeys(map(chr, (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF)), "�"),
}
