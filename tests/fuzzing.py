"""Hostile study files, made from the shipped ones, and a watch on what reading them does."""

from __future__ import annotations

import copy
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from flatbench.config import study_files
from flatbench.config.yaml import parse

REPOSITORY = Path(__file__).parents[1]
VARIABLES = {"data": "data", "model": "data/model", "encoder": "data/encoder"}

#: values that have broken readers of YAML, paths, numbers and text
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 10**9, 2**63, 2**64, 10**400, -(10**400), 0.0, -0.0, 1e-320, 1e308,
    float("nan"), float("inf"), -float("inf"), "", " ", "\0", "a\0b", "\n", "\r\n", "\u2028", "\ud800",
    "🦙" * 40, "ﷺ", "\x1b[2J", "[red]x[/red]", "{}", "{0.__class__}", "%s%n", "$(touch pwned)",
    "`touch pwned`", "; touch pwned", "__import__('os').system('touch pwned')", "${x}", "${}",
    "${data}/../..", "${", "..", "../..", "../../etc/passwd", "/etc/passwd", "/etc", "/", "//",
    "/proc/self/environ", "/dev/zero", "~", "~root", "~nobody-such/x", "~/.ssh", "data/../../etc",
    "data/link", "data/link/passwd", "file:///etc/passwd", "http://127.0.0.1:9/x", "csv", "pandas",
    "imagefolder", "x" * 300, "a/" * 3000, "x" * 20_000, "name", "lora", "sam", "none", "digits", "on",
    "1e-3", "0x10", "=cmd|' /C calc'!A0", "<script>alert(1)</script>", [], {}, [[]], [{}], {"": ""},
    {"name": None}, {"name": []}, {"name": "digits"}, {"name": "digits", "train_size": 10**12},
    ["a"] * 1000, list(range(300)), {"a": {"b": {"c": {}}}}, {"lr": [1e-3] * 2},
    {"lr": list(range(1, 400)), "batch_size": list(range(1, 400)), "epochs": list(range(1, 400))},
    {"task.data": ["/etc", "../.."]}, {"model.name_or_path": ["/etc", "~root"]},
    {"model": [{"name_or_path": "/etc"}]}, {"model.trust_remote_code": [True]},
    {"trust_remote_code": True}, {"task": ["digits", "glue", 3]}, {1: 2},
]  # fmt: skip

#: pieces of text put into a file: tags that construct objects, bombs, broken bytes
SNIPPETS = [
    "!!python/object/apply:os.system ['touch pwned']",
    "!!python/object/new:subprocess.Popen [['touch', 'pwned']]", "!!python/name:os.system",
    "!!python/module:os", "!!python/tuple [1]", "!!python/object:flatbench.study.Study {}", "!!set {a, b}",
    "!!omap [a: 1]", "!!pairs [a: 1]", "!!binary aGk=", "!!timestamp x", "!!bool x", "!!int ''",
    "!!float ''", "!!null x", "!!str [a]", "!!map [a]", "!!seq {}", "!x y", "2001-01-01",
    "2001-12-14t21:59:43.10-05:00", "2001-99-99", "0x" + "f" * 6000, "9" * 6000, "1:2:3", "190:20:30.15",
    ".nan", "-.inf", "1e400", "&a [*a]", "*nowhere", "&a {b: *a}", "{<<: *a}", "<<: {name: x}",
    "? [a]\n: b", "? {a: b}\n: c", "[" * 300, "{a: " * 300, "- " * 300, "\x00", "\x07", "\ufeff", "\u0085",
    "\t", "---\n", "...\n", "%YAML 9.9\n---\n", "%TAG ! tag:x,2000:\n", "|\n", ">-\n", '"\\ud800"',
    '"\\x00"', "'", '"', "#", ": ", "- ", "\n", "  ", "${", "${data", "}", "=", "/etc/passwd", "../" * 20,
    "yes", "~",
]  # fmt: skip


def documents() -> list[dict[str, Any]]:
    """The shipped studies with values for their variables."""
    found = []
    for path in study_files.predefined().values():
        content = parse(path.read_text(encoding="utf-8"))
        if "variables" in content:
            content["variables"] = {name: VARIABLES[name] for name in content["variables"]}
        found.append(content)
    text = {
        "name": "text_classification",
        "train": "data/train.csv",
        "validation": "data/v.csv",
        "test": "data/t.csv",
    }
    clip = {"name": "clip_classification", "data": "data", "split_file": "data/split.json"}
    shared = {"methods": ["lora", "sam"], "seeds": [0], "model": {"name_or_path": "data/model"}}
    layers = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    accelerate = {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": layers}
    train = {"processes": 2, "accelerate": accelerate}
    zero = {"zero_stage": 3, "offload_param_device": "cpu", "gradient_clipping": "auto"}
    deepspeed = {"distributed_type": "DEEPSPEED", "deepspeed_config": zero}
    return [
        *found,
        {"name": "text", "task": text, **shared},
        {"name": "clip", "task": clip, **shared, "train": train},
        {"name": "zero", "task": text, **shared, "train": {"processes": 2, "accelerate": deepspeed}},
    ]


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every key and item."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def studies(draw: st.DrawFn, bases: list[dict[str, Any]]) -> str:
    """The text of a study file after one to four changes of its structure, and perhaps some of its text."""
    content: Any = copy.deepcopy(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(0, 4))):
        content = _changed(draw, content, bases)
    text = _dumped(content)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2, 3]))):
        text = _garbled(draw, text)
    return text


def _dumped(content: Any) -> str:
    try:
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    except (UnicodeError, ValueError):
        return yaml.safe_dump(content, sort_keys=False)


def _changed(draw: st.DrawFn, content: Any, bases: list[dict[str, Any]]) -> Any:
    found = list(places(content))
    if not found:
        return content
    *above, key = draw(st.sampled_from(found))
    node = content
    for step in above:
        node = node[step]
    action = draw(
        st.sampled_from(["delete", "replace", "replace", "replace", "rename", "wrap", "copy", "insert"])
    )
    hostile = st.sampled_from(HOSTILE) | st.text(max_size=8) | st.integers() | st.floats()
    if action == "delete":
        del node[key]
    elif action == "replace":
        node[key] = copy.deepcopy(draw(hostile))
    elif action == "wrap":
        node[key] = draw(
            st.sampled_from([[node[key]], {"name": node[key]}, {str(key): node[key]}, str(node[key])])
        )
    elif action == "copy":  # a section of another study, or an option at a wrong place
        other = draw(st.sampled_from(bases))
        *path, last = draw(st.sampled_from(list(places(other))))
        for step in path:
            other = other[step]
        node[last if isinstance(node, dict) else key] = copy.deepcopy(other[last])
    elif isinstance(node, dict):
        name = draw(
            st.sampled_from([*VARIABLES, *map(str, HOSTILE[:60])]) | st.text(max_size=6) | st.integers()
        )
        node[name] = node.pop(key) if action == "rename" else copy.deepcopy(draw(hostile))
    else:
        node.insert(key, copy.deepcopy(draw(hostile)))
    return content


def _garbled(draw: st.DrawFn, text: str) -> str:
    at = draw(st.integers(0, len(text)))
    action = draw(st.sampled_from(["snippet", "snippet", "value", "cut", "drop", "repeat", "character"]))
    if action == "snippet":
        return text[:at] + draw(st.sampled_from(SNIPPETS)) + text[at:]
    if action == "value":  # in the place of a whole value, so that the file stays YAML
        lines = text.split("\n")
        number = draw(st.integers(0, len(lines) - 1))
        key, colon, _ = lines[number].partition(":")
        lines[number] = f"{key}{colon} {draw(st.sampled_from(SNIPPETS))}"
        return "\n".join(lines)
    if action == "cut":
        return text[:at]
    if action == "character":
        return text[:at] + draw(st.characters(codec="utf-8")) + text[at + 1 :]
    lines = text.split("\n")
    number = draw(st.integers(0, len(lines) - 1))
    return "\n".join(
        [
            *lines[:number],
            *(lines[number : number + 1] * 2 if action == "repeat" else ()),
            *lines[number + 1 :],
        ]
    )


#: events of Python's audit that reading a study has no reason for
FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.spawn", "os.posix_spawn", "os.startfile",
    "subprocess.Popen", "pty.spawn", "socket.", "urllib.", "ftplib.", "smtplib.", "pickle.find_class",
    "marshal.", "ctypes.", "code.__new__", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link",
    "os.symlink", "os.truncate", "os.chmod", "os.chown", "shutil.", "webbrowser.", "os.putenv",
    "os.unsetenv", "builtins.input", "tempfile.",
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Tells what happens while it looks: Python calls an audit hook at every opened file, import, process.

    A hook cannot be taken away again, so there is one, which looks only inside ``with watch.on(folder)``.
    """

    def __init__(self) -> None:
        self._roots: tuple[str, ...] | None = None
        self.seen: list[str] = []
        installed = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), REPOSITORY / "flatbench"]
        self.installed = tuple(sorted({os.path.realpath(p) for p in [*installed, REPOSITORY / "studies"]}))
        sys.addaudithook(self._hook)

    @contextmanager
    def on(self, *roots: Path) -> Iterator[None]:
        self.seen, self._roots = [], tuple(os.path.realpath(root) for root in roots)
        try:
            yield
        finally:
            self._roots = None

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._roots is None:
            return
        roots, self._roots = self._roots, None  # looking makes events itself
        try:
            self._look(event, arguments, roots)
        finally:
            self._roots = roots

    def _look(self, event: str, arguments: tuple[Any, ...], roots: tuple[str, ...]) -> None:
        if event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {arguments!r}"[:300])
        elif (
            event in ("open", "os.listdir", "os.scandir")
            and arguments
            and isinstance(arguments[0], str | bytes)
        ):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if event == "os.listdir" and path in map(os.path.realpath, sys.path):
                return  # imports look for modules there
            writes = event == "open" and bool((arguments[2] or 0) & _WRITES)
            if writes or not _below(path, (*roots, *self.installed)):
                self.seen.append(f"{event} {path} {arguments[1:]!r}"[:300])
        elif event in ("exec", "compile"):
            origin = getattr(arguments[0], "co_filename", None) if event == "exec" else arguments[1]
            if not _below(os.path.realpath(str(origin)), self.installed):
                self.seen.append(f"{event} {origin!r} {arguments[0]!r}"[:300])
        elif (
            event == "import" and arguments[1] and not _below(os.path.realpath(arguments[1]), self.installed)
        ):
            self.seen.append(f"import {arguments[:2]!r}"[:300])


def _below(path: str, folders: tuple[str, ...]) -> bool:
    return any(path == folder or path.startswith(folder + os.sep) for folder in folders)
