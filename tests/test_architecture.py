"""The rules of docs/architecture.md, read off the source: who imports whom, who owns which effect, how long things are.

The table of ranks in docs/architecture.md is the rule itself: the test reads it, so that the picture stays true.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from swifti2v import cli
from swifti2v.core import Request

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "swifti2v"
SOURCES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}
OUTSIDE = {
    "__init__",
    "__main__",
    "models.__init__",
    "train.__init__",
    "evaluate.__init__",
    "export.__init__",
    "batch.__init__",
}

LONG_FUNCTIONS = {
    "models.mobile_dit.MobileTransformer3DModel.__init__": "the config, one argument a line",
    "models.wan.SwiftI2VTransformer3DModel.__init__": "the config, one argument a line",
    "stage_one.motion_latents": "two kinds of Stage I network side by side",
}
MANY_PARAMETERS = {
    "mobile.MobileI2VPipeline.__call__": "diffusers' own argument names",
    "models.mobile_dit.MobileTransformer3DModel.__init__": "the arguments are the config that diffusers saves",
    "models.mobile_dit.MobileTransformer3DModel.forward": "diffusers' own argument names",
    "models.nano_vae.NanoVAE.__init__": "the arguments are the config that diffusers saves",
    "models.wan.SwiftI2VTransformer3DModel.__init__": "the arguments are the config that diffusers saves",
    "models.wan.SwiftI2VTransformer3DModel.forward": "diffusers' own argument names",
    "pipeline.SwiftI2VPipeline.__init__": "diffusers registers components by the names of these arguments",
    "pipeline.SwiftI2VPipeline.__call__": "diffusers' own argument names",
    "presets.resolve": "what a user may say about size and length, all but one by name only",
    "sources.load": "what the command line may say of weights and machine, by name only",
    "stage_one.motion_latents": "Stage II's refine plus what Stage I is told, most by name only",
    "stage_two.refine": "what the loop needs and what it may be given, most by name only",
    "train.__main__.main": "a parameter is a command-line option",
}


def ranks() -> dict[str, int]:
    """Module -> rank, from the table in docs/architecture.md."""
    found: dict[str, int] = {}
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        if match := re.match(r"\| (\d) \| ([^|]*) \|", line):
            for word in re.findall(r"`([^`]+)`", match[2]):
                pattern = word.replace("/", ".").replace("*", r"\w+")
                found |= {
                    name: int(match[1]) for name in SOURCES if re.fullmatch(pattern, name) and name not in OUTSIDE
                }
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def import_nodes(tree: ast.AST, lazy: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that happen: when the module loads or, with ``lazy``, also inside functions. Never TYPE_CHECKING's."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif is_type_checking(node) or (not lazy and isinstance(node, ast.FunctionDef)):
            continue
        else:
            yield from import_nodes(node, lazy)


def own_imports(name: str, lazy: bool) -> set[str]:
    """Modules of this package that ``name`` imports."""
    parent = name.split(".")[:-1]
    found = set()
    for node in import_nodes(TREES[name], lazy):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parent[: len(parent) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in SOURCES else ".".join(base))
        else:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(n.split(".")[0] == "swifti2v" for n in names), f"{name}: import relatively"
    return found - {""}


def foreign_imports(name: str) -> set[str]:
    """Top-level names of other packages that ``name`` imports, anywhere."""
    found = set()
    for node in import_nodes(TREES[name], lazy=True):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


def functions(name: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    def walk(node: ast.AST, path: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            inner = f"{path}.{child.name}" if isinstance(child, ast.FunctionDef | ast.ClassDef) else path
            if isinstance(child, ast.FunctionDef):
                yield inner, child
            yield from walk(child, inner)

    yield from walk(TREES[name], name)


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the dotted text of what is called."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


# --- who imports whom -------------------------------------------------------------------------------------------


def test_every_module_has_a_rank() -> None:
    assert set(ranks()) == set(SOURCES) - OUTSIDE


@pytest.mark.parametrize("name", sorted(set(SOURCES) - OUTSIDE))
def test_imports_go_down(name: str) -> None:
    rank = ranks()
    for imported in own_imports(name, lazy=True) - OUTSIDE:
        assert rank[imported] <= rank[name], f"{name} (rank {rank[name]}) imports {imported} (rank {rank[imported]})"


def test_training_and_the_cli_know_nothing_of_each_other() -> None:
    work = {"order", "produce", "origin", "shipped", "cli", "progress", "doctor"}
    for name in SOURCES:
        imported = own_imports(name, lazy=True)
        assert not (name.startswith("train.") and imported & work), name
        assert name.startswith("train.") or not any(other.startswith("train.") for other in imported), name


def test_models_know_tensors_alone() -> None:
    rank = ranks()
    for name in (n for n in SOURCES if n.startswith("models.") and n not in OUTSIDE):
        others = {other for other in own_imports(name, lazy=True) if not other.startswith("models.")}
        assert all(rank[other] == 0 for other in others), (name, others)


def test_no_circles_at_the_top_level() -> None:
    graph = {name: own_imports(name, lazy=False) for name in SOURCES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for imported in sorted(graph.get(name, ())):
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("av", {"media", "video_reader"}),
        # The pipeline speaks PIL to CLIP's processor; export's runner is a script of its own.
        ("PIL", {"images", "pipeline", "evaluate.picture", "export.runner"}),
        ("typer", {"cli", "options", "train.__main__"}),
        ("rich", {"cli", "progress", "train.logs", "evaluate.command", "evaluate.report"}),
        ("fcntl", {"journal", "outputs"}),
        ("pickle", {"checkpoints"}),  # its exception, to refuse what is not plain tensors
        ("huggingface_hub", {"sources", "shipped"}),
        ("peft", {"lora", "train.recipes"}),
        ("torchvision", set()),
        ("scipy", set()),
        ("requests", set()),
    ],
)
def test_one_owner_for_a_library(library: str, owners: set[str]) -> None:
    users = {name for name in SOURCES if library in foreign_imports(name)}
    training = {name for name in users if name.startswith("train.")}  # it reads photos its own way
    assert users - (training if library in ("av", "PIL") else set()) <= owners


# --- one owner per effect ---------------------------------------------------------------------------------------


def test_only_the_cli_prints_and_exits() -> None:
    for name in SOURCES:
        called = {text for text, _ in calls(name)}
        if name not in ("cli", "progress"):
            assert not called & {"print", "sys.exit", "exit", "sys.stdout.write", "sys.stderr.write"}, name


def test_only_memory_moves_modules() -> None:
    module = re.compile(r"(^|[._])(module|model|transformer(_2)?|vae(_2)?|text_encoder|image_encoder|pipe(line)?)\.to$")
    for name in set(SOURCES) - {"memory"}:
        for text, call in calls(name):
            assert not module.search(text), f"{name}:{call.lineno} {text}"
            assert not text.endswith((".cuda", ".to_empty", ".half", "empty_cache")), f"{name}:{call.lineno} {text}"


def test_no_environment_is_read() -> None:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("environ", "getenv", "environb", "putenv"), f"{name}:{node.lineno}"


def test_errors_are_never_swallowed() -> None:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = "everything" if node.type is None else ast.unparse(node.type)
                broad = caught == "everything" or re.search(r"\b(Base)?Exception\b", caught)
                # To clean up after anything is right, as long as it is raised again.
                again = any(isinstance(inner, ast.Raise) for inner in node.body)
                assert not broad or (again and caught == "BaseException"), f"{name}:{node.lineno} except {caught}"
                assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), f"{name}:{node.lineno} pass"


def test_weights_are_loaded_strictly_and_safely() -> None:
    for name in SOURCES:
        for text, call in calls(name):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            other = ("zip", "torch.export.export")  # whose "strict" is not about weights
            assert text in other or given.get("strict") != "False", f"{name}:{call.lineno}"
            if text == "torch.load":
                assert given["weights_only"] == "True" and name == "checkpoints", f"{name}:{call.lineno}"
            assert text not in ("eval", "exec", "os.system", "pickle.load", "pickle.loads"), f"{name}:{call.lineno}"
            assert given.get("shell") != "True", f"{name}:{call.lineno}"


def test_nothing_is_left_undone() -> None:
    for name, path in SOURCES.items():
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b", path.read_text()), name


# --- the tail is short ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_files_say_what_they_are_for_and_are_short(name: str) -> None:
    lines = SOURCES[name].read_text().splitlines()
    assert len(lines) <= 400, len(lines)
    assert ast.get_docstring(TREES[name]) or not lines
    assert not lines or "from __future__ import annotations" in lines or not any(functions(name))


def test_two_folder_levels_and_no_third() -> None:
    assert all(name.count(".") <= 1 for name in SOURCES)


def body_lines(function: ast.FunctionDef) -> int:
    """Lines from ``def`` to the end, the docstring not counted."""
    total = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return total - ((first.end_lineno or 0) - first.lineno + 1 if documented else 0)


def parameters(function: ast.FunctionDef) -> int:
    """Parameters but self and cls."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    own = bool(named) and named[0].arg in ("self", "cls")
    return len(named) - own + (given.vararg is not None) + (given.kwarg is not None)


def test_functions_are_short() -> None:
    long = {path for name in SOURCES for path, function in functions(name) if body_lines(function) > 40}
    assert long <= set(LONG_FUNCTIONS), long - set(LONG_FUNCTIONS)


def test_functions_take_seven_parameters_at_most() -> None:
    # In cli a parameter is a command-line option: the signature is the interface that typer reads.
    many = {path for name in SOURCES if name != "cli" for path, function in functions(name) if parameters(function) > 7}
    assert many <= set(MANY_PARAMETERS), many - set(MANY_PARAMETERS)


def test_exceptions_to_the_rules_are_used() -> None:
    lengths = {path: body_lines(function) for name in SOURCES for path, function in functions(name)}
    widths = {path: parameters(function) for name in SOURCES for path, function in functions(name)}
    assert not {path for path in LONG_FUNCTIONS if lengths.get(path, 0) <= 40}
    assert not {path for path in MANY_PARAMETERS if widths.get(path, 0) <= 7}


# --- light where it has to be -----------------------------------------------------------------------------------


def python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_light_modules_stay_light() -> None:
    """What ``--help``, ``plan`` and a mistyped option need is there without torch."""
    light = ["cli", "core", "segments", "machine", "presets", "costs", "costs_nano", "calibration", "plan", "progress"]
    light += ["costs_mobile", "costs_wan_vae", "costs_tiles", "options", "plan_mobile"]
    assert not any("torch" in foreign for foreign in map(foreign_imports, ("core", "segments", "presets", "machine")))
    heavy = "{'torch', 'diffusers', 'transformers', 'av', 'PIL', 'numpy'}"
    script = f"import sys\nfrom swifti2v import {', '.join(light)}\nprint({heavy} & set(sys.modules))"
    assert python(script) == "set()"


def test_help_and_plan_load_no_torch() -> None:
    for arguments in (["--help"], ["generate", "--help"], ["models", "--help"]):
        script = (
            f"import sys, swifti2v.cli as c\ntry: c.main({arguments})\nexcept SystemExit: print('torch' in sys.modules)"
        )
        assert python(script).endswith("False"), arguments


def test_the_package_is_lazy() -> None:
    script = (
        "import sys, swifti2v\n"
        "assert not {'torch', 'pydantic'} & set(sys.modules)\n"
        "assert set(swifti2v.__all__) <= set(dir(swifti2v))\n"
        "assert swifti2v.Size.parse('2560x1408').area == 2560 * 1408 and 'torch' not in sys.modules\n"
        "assert swifti2v.SwiftI2VPipeline.__name__ == 'SwiftI2VPipeline' and 'torch' in sys.modules\n"
        "assert all(getattr(swifti2v, name).__name__ == name for name in swifti2v.__all__)\n"
        "try: swifti2v.Nothing\n"
        "except AttributeError as error: print(error)"
    )
    assert python(script).endswith("module 'swifti2v' has no attribute 'Nothing'")


# --- the command line promises what a request can be ------------------------------------------------------------


def test_help_speaks_of_every_field_of_a_request() -> None:
    command = get_command(cli.app).commands["generate"]  # type: ignore[attr-defined]
    told = {name.removeprefix("--").replace("-", "_") for option in command.params for name in option.opts}
    spoken_otherwise = {"width": "size", "height": "size", "csg": "segment_blocks"}
    found_from_files = {"image_sha256", "motion_sha256"}
    for field in set(Request.model_fields) - found_from_files:
        assert spoken_otherwise.get(field, field) in told, field
    assert all(option.help for option in command.params)
