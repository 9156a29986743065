"""Draw what was found: prologue, stacks of blocks inside the guard, epilogue, the streams between them, and the cache."""

from __future__ import annotations

from typing import Any

from bwcache_compile.html_report.drawing import Drawing, shortened
from bwcache_compile.html_report.formatting import count_text, shape_text, stack_runs
from bwcache_compile.printing import bytes_text

_WIDTH = 412
_LEFT, _INNER = 12, 288
"""Where the graph's column begins, and its width; the cache stands to the right of it."""
_CELL, _GAP, _PER_ROW = 22, 4, 10
_AXIS = _LEFT + _INNER / 2
_STREAMS = 4
"""Streams that are drawn; more are counted."""
_ROLES = 5
"""Roles of slots that there is room for; more are counted where the blocks take less room."""


def architecture(data: dict[str, Any]) -> Drawing:
    """Draw a model from top to bottom, the cache to the right."""
    found, plan, parts = data["found"], data["plan"], data["found"]["parts"]
    drawing = Drawing("Structure of the cached model", _description(data), _WIDTH, 0)
    y = _box(drawing, 8, "inputs", ", ".join(value["name"] for value in data["model"]["inputs"]), "plain")
    y = _streams(drawing, y, [])
    y = _box(drawing, y, "prologue", count_text(len(parts["prologue"]), "operator"), "always")
    y = _streams(drawing, y, [] if not plan["regions"] else plan["regions"][0]["live_ins"])
    top = y
    guards = len(plan["regions"])
    decides = "the graph decides" if data["guard"] == "graph" else "the host decides"
    drawing.text(_LEFT + 10, y + 18, "guard" if guards == 1 else f"{guards} guards", "strong")
    drawing.text(_LEFT + _INNER - 10, y + 18, f"{plan['settings']['policy']}; {decides}", "small", "end")
    y += 30
    for i, members in enumerate(stack_runs(found["blocks"])):
        y = _streams(drawing, y, members[0]["live_outs"], small=True) if i else y
        y = _stack(drawing, y, members)
    if parts["between"]:
        drawing.text(_AXIS, y + 12, f"and {count_text(len(parts['between']), 'operator')} outside the blocks", "small", "middle")
        y += 18
    roles = len({slot["role"] for region in plan["regions"] for slot in region["slots"]})
    bottom = max(y + 6, top + 48 + 30 * min(roles, _ROLES))
    drawing.shapes.insert(0, {"kind": "rect", "style": "guard", "x": _LEFT, "y": top, "width": _INNER, "height": bottom - top, "radius": 8})
    drawing.shapes[0]["hint"] = "a reused step skips what is inside"
    _cache(drawing, top, bottom, plan)
    y = _streams(drawing, bottom, [] if not plan["regions"] else plan["regions"][-1]["live_outs"])
    y = _box(drawing, y, "epilogue", count_text(len(parts["epilogue"]), "operator"), "always")
    y = _streams(drawing, y, [])
    drawing.text(_AXIS, y + 13, "output", "strong", "middle")
    drawing.height = y + 22
    return drawing


def _description(data: dict[str, Any]) -> str:
    found, plan, parts = data["found"], data["plan"], data["found"]["parts"]
    stacks = "; ".join(f"{s['first']} to {s['last']}, {s['count']} times {s['module_type'] or 'modules'}" for s in found["stacks"])
    cached = sum(block["cached"] for block in found["blocks"])
    return (
        f"From top to bottom: the inputs; a prologue of {count_text(len(parts['prologue']), 'operator')}, which runs at every step;"
        f" {count_text(len(found['blocks']), 'block')} ({stacks}), of which a reused step skips {cached};"
        f" an epilogue of {count_text(len(parts['epilogue']), 'operator')}, which runs at every step. Beside the blocks, the cache of one"
        f" context: {bytes_text(plan['state_bytes'])} in {count_text(sum(len(r['slots']) for r in plan['regions']), 'slot')}."
    )


def _box(drawing: Drawing, y: float, name: str, text: str, style: str) -> float:
    drawing.rect(_LEFT, y, _INNER, 34, style, radius=8)
    drawing.text(_LEFT + 10, y + 21, name, "strong")
    drawing.text(_LEFT + _INNER - 10, y + 21, shortened(text, 36), "small", "end")
    return y + 34


def _streams(drawing: Drawing, y: float, values: list[dict[str, Any]], small: bool = False) -> float:
    """Draw an arrow for each of the values that are handed on, with their names and shapes beside it."""
    shown = values[:_STREAMS]
    texts = [f"{shortened(value['name'], 20)}  {shape_text(value)}" for value in shown] if not small else []
    if len(values) > len(shown) and not small:
        texts.append(f"and {len(values) - len(shown)} more")
    height = max(22, 13 * len(texts) + 10)
    count = max(1, len(shown))
    left = _LEFT + 24 if texts else _AXIS
    for i in range(count):
        drawing.arrow(left + (i - (0 if texts else (count - 1) / 2)) * 8, y + 2, y + height - 2)
    for i, text in enumerate(texts):
        drawing.text(left + count * 8 + 6, y + 15 + 13 * i, text, "small")
    return y + height


def _stack(drawing: Drawing, y: float, members: list[dict[str, Any]]) -> float:
    """Draw a cell for each block of a stack, filled where it is cached."""
    first, last = members[0], members[-1]
    name = first["name"] if len(members) == 1 else f"{first['name']} .. {last['name']}"
    drawing.text(_LEFT + 14, y + 12, shortened(name, 42), "strong")
    drawing.text(_LEFT + 14, y + 27, shortened(f"{len(members)} × {first['module_type'] or 'modules'}", 42), "small")
    y += 34
    for place, block in enumerate(members):
        x = _LEFT + 14 + place % _PER_ROW * (_CELL + _GAP)
        row = y + place // _PER_ROW * (_CELL + _GAP)
        hint = f"{block['name']}: {'cached' if block['cached'] else 'computed at every step'}"
        drawing.rect(x, row, _CELL, _CELL, "cached" if block["cached"] else "always", hint, radius=4)
        drawing.text(x + _CELL / 2, row + 15, block["place"], "on-cached" if block["cached"] else "small", "middle")
    rows = -(-len(members) // _PER_ROW)
    return y + rows * (_CELL + _GAP) + 4


def _cache(drawing: Drawing, top: float, bottom: float, plan: dict[str, Any]) -> None:
    """Draw the slots of one context by role, written by a computed step and read by a reused one."""
    roles: dict[str, list[int]] = {}
    for region in plan["regions"]:
        for slot in region["slots"]:
            roles.setdefault(slot["role"], []).append(slot["bytes"])
    right, width = _LEFT + _INNER, 92
    x = _WIDTH - width - 1
    drawing.rect(x, top, width, bottom - top, "cache", "the cache of one context", radius=8)
    drawing.text(x + 8, top + 18, "cache", "strong")
    drawing.text(x + 8, top + 32, bytes_text(plan["state_bytes"]), "small")
    room = int((bottom - top - 44) // 30)
    shown = list(roles.items()) if len(roles) <= room else list(roles.items())[: max(0, room - 1)]
    y = top + 52
    for role, sizes in shown:
        drawing.text(x + 8, y, shortened(role, 14), "small")
        drawing.text(x + 8, y + 12, f"{len(sizes)} × {bytes_text(max(sizes))}", "tiny")
        y += 30
    if len(shown) < len(roles):
        drawing.text(x + 8, y, f"{len(roles) - len(shown)} more roles", "tiny")
    middle = min(bottom - 10, top + 60)
    drawing.line([(right, middle - 24), (x, middle - 24)], "write")
    drawing.line([(x - 5, middle - 28), (x, middle - 24), (x - 5, middle - 20)], "write")
    drawing.line([(x, bottom - 8), (right, bottom - 8)], "flow")
    drawing.line([(right + 5, bottom - 12), (right, bottom - 8), (right + 5, bottom - 4)], "flow")
