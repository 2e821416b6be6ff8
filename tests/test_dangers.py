"""Nothing in the package can run what a file says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flatbench

PACKAGE = Path(flatbench.__file__).parent

#: modules and calls that can run what a file says
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.hub.load"),
    *("np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle", "yaml.unsafe_load", "yaml.full_load"),
    *("yaml.load_all", "yaml.full_load_all", "yaml.unsafe_load_all", "runpy.run_path", "runpy.run_module"),
}


def test_nothing_in_the_package_unpickles_or_evaluates() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    found = [f"{file.relative_to(PACKAGE)}:{what}" for file in files for what in dangers(file.read_text())]
    assert found == []
    reads = [file.name for file in files if "torch.load(" in file.read_text()]
    # on the user's own command alone, and an optimizer's state, which only the Trainer's pickle holds
    assert sorted(reads) == ["convert.py", "moments.py"]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "eval('1')",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import yaml\nyaml.load(text, Loader=yaml.UnsafeLoader)",
        "AutoModel.from_pretrained(name)",
        "subprocess.run(text, shell=True)",
        "datasets.load_dataset(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds_dangers(line: str) -> None:
    assert len(list(dangers(line))) == 1


def dangers(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            yield from (f"{node.lineno} imports {name}" for name in names if name.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            yield from _dangerous_call(node)


def _dangerous_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    where = f"{node.lineno} {name}"
    weights_only = keywords.get("weights_only")
    if name == "torch.load" and isinstance(weights_only, ast.Constant) and weights_only.value is True:
        return  # tensors alone; see below where
    if name in CALLS or name.endswith((".read_pickle", ".to_pickle")):
        yield where
    # the study's loader is PyYAML's safe one, with another resolver
    if name == "yaml.load" and ast.unparse(node.args[1] if len(node.args) > 1 else node.func) != "_Loader":
        yield where
    if "shell" in keywords:
        yield f"{where} through a shell"
    trusted = keywords.get("trust_remote_code")
    if isinstance(trusted, ast.Constant) and trusted.value is not False:
        yield f"{where} trusts"
    is_model = not any(kind in name for kind in ("Config", "Tokenizer", "Processor", "Peft", "loader"))
    if name.endswith(".from_pretrained") and is_model and "use_safetensors" not in keywords:
        yield f"{where} takes any format"
