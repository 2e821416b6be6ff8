"""A figure's SVG made small, for a page that carries all of its figures and is sent by mail.

matplotlib writes coordinates to six decimals and every style at every point. Here coordinates keep two
decimals (a hundredth of a point), equal styles become a class, and groups that say nothing go; nothing is
left out of the picture.
"""

from __future__ import annotations

import re
from urllib.parse import quote
from xml.etree import ElementTree as Tree

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_DECIMALS = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_POINTERS = re.compile(r"(?:^|\()#([\w-]+)")
_TAGS = re.compile(r"<[^<>]*>")
_FONTS = re.compile(r"font-family:[^;]*")
#: attributes with coordinates
_PLACES = {"d", "x", "y", "transform", "points", "width", "height"}


def small(svg: str) -> str:
    """The same picture in fewer characters: one SVG of its own, without declarations and without metadata."""
    root = Tree.fromstring(svg)
    used = {name for e in root.iter() for text in e.attrib.values() for name in _POINTERS.findall(text)}
    defined = used & {e.get("id", "") for e in root.iter()}
    classes: dict[str, str] = {}
    _shorten(root, {name: f"i{i}" for i, name in enumerate(sorted(defined))}, classes)
    rules = Tree.SubElement(root, "style")
    rules.text = "*{stroke-linejoin:round;stroke-linecap:butt}" + "".join(
        f".{name}{{{style}}}" for style, name in classes.items()
    )
    root.remove(rules)
    root.insert(0, rules)
    root.set("xmlns", _SVG)
    return Tree.tostring(root, encoding="unicode")


def address(svg: str) -> str:
    """An SVG as the address of an image: readable text, nothing that ends an attribute of HTML."""
    single = _TAGS.sub(lambda tag: tag[0].replace("'", "&#39;").replace('"', "'"), svg)
    return "data:image/svg+xml," + quote(single, safe=" !'()*+,-./:;=?@[]^_`{|}~$")


def _shorten(element: Tree.Element, ids: dict[str, str], classes: dict[str, str]) -> None:
    """Shorten an element and what it holds, in place."""
    element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
    for name in list(element.attrib):
        value = element.attrib.pop(name)
        if name == "id" and value not in ids:
            continue
        if name == "style":
            style = re.sub(r"\s*([:;,])\s*", r"\1", value.strip().rstrip(";"))
            style = _FONTS.sub("font-family:DejaVu Sans,Verdana,sans-serif", style)
            element.set("class", classes.setdefault(style, f"c{len(classes)}"))
            continue
        if name in _PLACES:
            value = _DECIMALS.sub(lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
            value = re.sub(r"\s+", " ", value).strip().replace("-0 ", "0 ")
            value = re.sub(r" ?([A-Za-z]) ?", r"\1", value) if name == "d" else value
        if name == "transform" and value.startswith("rotate(0 "):
            continue
        if name == "id":
            value = ids[value]
        elif "#" in value:
            value = _POINTERS.sub(
                lambda found: found[0].replace(found[1], ids.get(found[1], found[1])), value
            )
        element.set(name.replace(f"{{{_LINK}}}", ""), value)
    element.text, element.tail = (t if t and t.strip() else None for t in (element.text, element.tail))
    kept = [child for child in element if not child.tag.endswith(("}metadata", "}style"))]
    for child in kept:
        _shorten(child, ids, classes)
    element[:] = [inner for child in kept for inner in _opening_tag(child)]
    # equal styles of all children are the group's: a cloud of points says once how it looks
    own = {child.get("class") for child in element}
    if (
        element.tag == "g"
        and len(element) > 1
        and len(own) == 1
        and not element.get("class")
        and None not in own
    ):
        element.set("class", own.pop() or "")
        for child in element:
            del child.attrib["class"]


def _opening_tag(child: Tree.Element) -> list[Tree.Element]:
    """What a group without any attribute holds; nothing of an empty one."""
    if child.tag in ("g", "defs") and not len(child):
        return []
    return list(child) if child.tag == "g" and not child.attrib else [child]
