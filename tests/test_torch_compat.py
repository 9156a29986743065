"""Each private name of torch that the package uses does on this version what it is used for."""

from __future__ import annotations

import ast
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import bwcache_compile
from bwcache_compile.ir import torch_compat

ROOT = Path(bwcache_compile.__file__).parent
PRIVATE = ("torch.fx.experimental",)
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "torch_compat.py")


def private_imports(source: str) -> set[str]:
    """Return what a source imports of torch that is private or experimental."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else modules
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            if module.split(".")[0] != "torch":
                continue
            words = [*module.split("."), *names]
            if module.startswith(PRIVATE) or any(word.startswith("_") for word in words):
                found.add(f"{module}: {', '.join(names)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_private_names_are_imported_in_one_file(path: Path) -> None:
    assert private_imports(path.read_text()) == set()


def test_the_rule_sees_a_private_import() -> None:
    source = "from torch import nn\nfrom torch._ops import OpOverload\nfrom torch.utils import _pytree\nimport torch._inductor"
    assert private_imports(source) == {"torch._ops: OpOverload", "torch.utils: _pytree", "torch._inductor: "}


def test_what_is_listed_is_there() -> None:
    assert [name for name in torch_compat.__all__ if not hasattr(torch_compat, name)] == []


def test_operators() -> None:
    add = torch.ops.aten.add.Tensor
    assert isinstance(add, torch_compat.OpOverload)
    assert isinstance(torch.ops.aten.add, torch_compat.OpOverloadPacket)
    assert isinstance(torch.ops.higher_order.cond, torch_compat.HigherOrderOperator)
    assert any(hasattr(home, "add") for home in torch_compat.function_homes())
    x = torch.arange(6.0).view(2, 3)
    assert torch_compat.force_stride_order()(x, [3, 1]) is not None


def test_fake_tensors_and_their_mode() -> None:
    mode = torch_compat.FakeTensorMode(shape_env=torch_compat.ShapeEnv())
    fake = mode.from_tensor(torch.ones(2, 3), static_shapes=True)
    assert isinstance(fake, torch_compat.FakeTensor)
    assert torch_compat.detect_fake_mode([fake]) is mode
    assert torch_compat.is_concrete_int(fake.shape[0])
    assert torch_compat.statically_known_true(fake.shape[0] == 2)


def test_tracing() -> None:
    graph = torch_compat.make_fx(lambda x: x + 1)(torch.ones(2)).graph
    assert [node.target for node in graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)]
    exported = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch_compat.load_verifier("ATEN")().check(exported)


def test_trees() -> None:
    leaves, spec = torch_compat.pytree.tree_flatten({"a": [1, 2], "b": 3})
    assert isinstance(spec, torch_compat.TreeSpec)
    assert (leaves, spec.num_leaves) == ([1, 2, 3], 3)


def test_sizes_are_printed_as_python() -> None:
    import sympy

    x = sympy.Symbol("x", integer=True, positive=True)
    assert torch_compat.PythonPrinter().doprint(x + 1) == "1 + x"


def test_modes() -> None:
    assert not torch_compat.is_any_autocast_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch_compat.is_any_autocast_enabled()
    mode = torch_compat.FakeTensorMode()
    with mode, torch_compat.disable_current_modes():
        assert not isinstance(torch.ones(1), torch_compat.FakeTensor)


def test_dynamo_is_told_of_frames_and_sizes() -> None:
    seen = []

    def outer(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_compat.get_eval_frame_callback())
        return x + 1

    torch_compat.skip(outer)
    x = torch.ones(4)
    torch_compat.maybe_mark_dynamic(x, 0)
    compiled = torch.compile(lambda x: outer(x) * 2, backend="eager")
    thread = threading.Thread(target=compiled, args=(x,))
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert len(seen) == 1
    assert torch_compat.get_eval_frame_callback() is None
