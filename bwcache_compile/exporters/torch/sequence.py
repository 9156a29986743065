"""Write a compute graph as packages that are called one after another: a package for each kind of block, called with its weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable
from pathlib import Path

from bwcache_compile.bundle.manifest import CallEntry, GraphEntry, SequenceEntry
from bwcache_compile.exporters.graphs import PlainGraph, exported_graph
from bwcache_compile.exporters.torch.package import TorchGraph, compile_package, save, torch_graph
from bwcache_compile.exporters.torch.stages import Stage, Stages, split_blocks
from bwcache_compile.exporters.weights import WeightFile
from bwcache_compile.ir.program import ModelProgram

PACKAGE = "package.pt2"
_BEFORE, _BETWEEN, _AFTER = "before_blocks", "between_blocks", "after_blocks"


@dataclasses.dataclass(frozen=True)
class Package:
    """A compiled stage, which stands for all that are like it.

    Attributes:
        file: In the bundle.
        stage: The one that was compiled.
        graph: The program that it was compiled from.
        conditions: What the compiler assumed of the dynamic sizes.
    """

    file: str
    stage: Stage
    graph: TorchGraph
    conditions: list[str]

    def weights_of(self, stage: Stage) -> list[str]:
        """Return the names of the weights that it takes where it stands for a stage, in its order."""
        names = dict(zip(self.stage.weights, stage.weights, strict=True))
        return [names.get(name, name) for name in self.graph.tensors]  # casts may have made constants, which have one name


@dataclasses.dataclass(frozen=True)
class PackageSequence:
    """A graph as calls of packages.

    Attributes:
        entry: What the manifest says of it.
        packages: Each once.
        weights: Names of the weights that the calls read, as the model has them.
    """

    entry: GraphEntry
    packages: list[Package]
    weights: set[str]

    @property
    def region(self) -> dict[str, str]:
        """Of each operator that came from the cached region: its package and name there, and the node it was."""
        return {f"{package.file}: {name}": origin for package in self.packages for name, origin in package.graph.region.items()}

    @property
    def unmarked(self) -> int:
        """How many operators do not say where they come from."""
        return sum(package.graph.unmarked for package in self.packages)

    @property
    def conditions(self) -> list[str]:
        """What the compiler assumed of the dynamic sizes, in any package."""
        return [condition for package in self.packages for condition in package.conditions]


def package_names(stages: Stages, program: ModelProgram) -> dict[Hashable, str]:
    """Return a folder for each kind of stage, by its key: the class of the blocks, or where it stands among them."""
    types = {block.name: block.module_type for block in program.planned().blocks}
    last, names = len(stages.stages) - 1, dict[Hashable, str]()
    for i, stage in enumerate(stages.stages):
        if stage.key in names:
            continue
        place = _BEFORE if i == 0 else _AFTER if i == last else _BETWEEN
        name = plain = place if stage.block is None else re.sub(r"\W", "_", types[stage.block])
        taken, count = {other.casefold() for other in names.values()}, 1
        while name.casefold() in taken:
            count += 1
            name = f"{plain}_{count}"
        names[stage.key] = name
    return names


def write_sequence(program: ModelProgram, folder: Path, weights: WeightFile) -> PackageSequence:
    """Compile the stages of a compute graph, each kind once, to `<class of the blocks>/package.pt2`.

    Args:
        program: Its blocks are calls (`outline_blocks`).
        folder: The bundle.
        weights: The weights of all calls are added, under the names that the model has for them.

    Raises:
        ExportError: The graph cannot be split, or a stage does not compile.
    """
    stages = split_blocks(program)
    names, packages = package_names(stages, program), dict[Hashable, Package]()
    calls, read = [], set[str]()
    for stage in stages.stages:
        if stage.key not in packages:
            file = f"{names[stage.key]}/{PACKAGE}"
            packages[stage.key] = _compiled(program, stages, stage, folder, file)
        package = packages[stage.key]
        held, taken = {**package.graph.tensors, **stages.attributes}, package.weights_of(stage)
        read |= set(taken)
        stored = tuple(weights.add(name, held[name]) for name in taken)
        calls.append(CallEntry(file=package.file, weights=stored, inputs=stage.inputs, outputs=stage.outputs, block=stage.block))
    sequence = SequenceEntry(calls=tuple(calls), returned=stages.returned)
    entry = GraphEntry(inputs=stages.inputs, outputs=stages.outputs, sequence=sequence)
    return PackageSequence(entry, list(packages.values()), read)


def _compiled(program: ModelProgram, stages: Stages, stage: Stage, folder: Path, file: str) -> Package:
    path = folder / file
    path.parent.mkdir()
    plain = PlainGraph(path.parent.name, exported_graph(program, stages.attributes, stage.graph), stage.inputs, stage.outputs)
    graph = save(torch_graph(plain), path)
    return Package(file, stage, graph, compile_package(graph, path))
