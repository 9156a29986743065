"""Show which blocks of a model are cached, and which candidates are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bwcache_compile as bw
from bwcache_compile.cli.models import head, loaded, transformed
from bwcache_compile.cli.named import Named
from bwcache_compile.cli.screen import Screen, shape_text, table
from bwcache_compile.cli.source import Source
from bwcache_compile.ir.compare import Verify
from bwcache_compile.printing import bytes_text


def inspect_model(screen: Screen, named: Named, config: bw.CacheConfig | None, blocks: Sequence[str] | None, verify: Verify) -> None:
    """Show the blocks, what was turned down, and what caching them takes.

    Raises:
        NoBlocksFoundError: There is nothing to cache; the document was written nevertheless.
    """
    source = loaded(screen, named)
    try:
        cached = transformed(screen, source, config, blocks, verify=verify)
    except bw.NoBlocksFoundError:
        search = bw.find_blocks(source.model, blocks=blocks or None, example_args=source.args, example_kwargs=source.kwargs)
        screen.show({**head(source), **search.to_dict(), "plan": None}, f"{source.title}: no blocks found", str(search))
        raise
    search, plan, program = bw.find_blocks(cached, blocks=blocks or None), cached.plan.to_dict(), cached.program
    found = search.to_dict()
    skipped = set(plan["blocks"])
    for block in found["blocks"]:
        block["cached"] = block["name"] in skipped
        block["live_outs"] = [program.value(name) for name in block["live_outs"]]
    for region in plan["regions"]:
        for side in ("live_ins", "live_outs"):
            region[side] = [program.value(name) for name in region[side]]
    inputs = [program.value(name) for name in program.signature.inputs]
    document = {**head(source), "inputs": [value for value in inputs if value["shape"] is not None], **found, "plan": plan}
    screen.show(document, *_inspection(source, document, cached))


def _inspection(source: Source, document: dict[str, Any], cached: bw.CachedModel) -> list[Any]:
    """Lay an inspection out for people."""
    plan = document["plan"]
    stacks = [(s["name"], s["count"], s["module_type"], f"{s['first']} .. {s['last']}") for s in document["stacks"]]
    parts: list[Any] = [
        f"{source.title} ({source.named}): {len(document['blocks'])} blocks in {len(stacks)} stack{'s' * (len(stacks) != 1)}",
        table(("stack", "blocks", "class", "from .. to"), stacks, ("blocks",)),
        "",
    ]
    if document["rejections"]:
        rows = [(r["stack"], r["count"], r["reason"]) for r in document["rejections"]]
        parts += ["rejected candidates:", table(("stack", "modules", "reason"), rows, ("modules",)), ""]
    for region in plan["regions"]:
        name = f"region of block {region['tag']}" if region["tag"] else "region"
        parts.append(f"{name}: {region['nodes']} operators, {len(region['measured'])} blocks measured")
        for side, word in (("live_ins", "live-ins"), ("live_outs", "live-outs")):
            parts.append(f"  {word}: {', '.join(map(shape_text, region[side]))}")
    columns = ("slots", "count", "role", "tensor", "bytes")
    parts += ["", "cache of one context:", table(columns, _slot_rows(plan), ("count", "bytes")), "", str(cached.plan)]
    return parts


def _slot_rows(plan: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Return a row for the slots of each role and shape."""
    alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for region in plan["regions"]:
        for slot in region["slots"]:
            alike.setdefault((slot["role"], shape_text(slot).partition(" ")[2]), []).append(slot)
    return [
        (
            slots[0]["name"] if len(slots) == 1 else f"{slots[0]['name']} .. {slots[-1]['name']}",
            len(slots),
            role,
            tensor,
            bytes_text(sum(slot["bytes"] for slot in slots)),
        )
        for (role, tensor), slots in alike.items()
    ]
