"""The code reads as a line: what a module may import is what comes before it."""

import ast
import subprocess
import sys
from pathlib import Path

import mcdeploy

ROOT = Path(__file__).parents[1]
LINE = [
    "errors", "section", "connectivity.topology", "connectivity.stages", "connectivity.gates",
    "connectivity.loops", "connectivity.wiring", "backbones", "connectivity.fixed", "connectivity.sparse",
    "connectivity.maskconnect", "connectivity.gateconnect", "connectivity.ddw", "connectivity.nnmass",
    "connectivity.rules", "connectivity", "recipe", "data", "checkpoint", "model", "evaluate", "train",
    "compile.prune", "compile.fold", "compile.branches", "compile.certify", "compile.conditional",
    "compile.dynamic", "compile", "memory", "backends.onnx", "backends.readback", "backends.fp16",
    "backends.int8", "backends.tensorrt", "backends.openvino", "backends.pytorch", "backends", "verify",
    "departure", "intervals", "surroundings", "gpu_state", "bench_report", "bench", "bench_images", "profile",
    "forms", "wiring_file", "package", "static", "draw", "report", "bench_page", "search", "targets", "demo",
    "doctor", "serve_options", "flags", "console", "runs", "opening", "cli",
]  # fmt: skip


def modules():
    for path in sorted((ROOT / "mcdeploy").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "mcdeploy").with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text())


def imports_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mcdeploy"):
            base = (node.module or "").removeprefix("mcdeploy").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                home = "backbones" if base.startswith("backbones") else base
                yield inner if inner in LINE else home
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("mcdeploy.") for a in node.names if a.name.startswith("mcdeploy."))


def test_imports_follow_the_line_and_never_point_back():
    for name, tree in modules():
        if name.split(".")[0] in ("__init__", "backbones"):
            continue
        assert name in LINE, f"{name} has no place in the line"
        for imported in imports_of(tree):
            assert LINE.index(imported) < LINE.index(name), f"{name} imports {imported}, which comes later"


def test_only_what_the_commands_call_knows_the_whole_recipe():
    for name, tree in modules():
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert "Recipe" not in names or name in ("runs", "recipe"), f"{name} knows the whole recipe"


def test_the_command_line_starts_without_torch():
    heavy = "{'torch', 'timm', 'onnx', 'numpy', 'pydantic'}"
    code = f"import sys, mcdeploy.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_public_names_are_these_and_all_of_them_exist():
    assert mcdeploy.__all__ == (ROOT / "tests" / "golden" / "public_names.txt").read_text().split()
    assert all(getattr(mcdeploy, name) is not None for name in mcdeploy.__all__)
