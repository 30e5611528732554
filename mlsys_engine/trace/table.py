"""A trace as a table: the blocks and what is around them, with what they take and cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlsys_engine.trace.values import Cut, ModuleCall, Trace

_HEADER = ("module", "kind", "output", "FLOPs", "parameters", "saved", "crosses before")


def table(trace: Trace) -> str:
    """One line a block call, or module call outside of the blocks that has parameters or FLOPs of its own."""
    total = sum(parameter.num_bytes for parameter in trace.parameters)
    name = next((module.class_name for module in trace.modules), "model")
    lines = [f"{name}: {len(trace.parameters)} parameters, {_size(total)}; order: {trace.order_source}."]
    if trace.ties:
        lines.append("Tied: " + ", ".join(f"{alias} = {fqn}" for alias, fqn in trace.ties.items()) + ".")
    if not trace.calls:
        lines += [f"Blocks: {', '.join(group)}." for group in trace.repeated_blocks()]
        return "\n".join(lines)
    lines.append(
        f"Forward {_flops(trace.forward_flops)}FLOP, backward {_flops(trace.backward_flops)}FLOP, "
        f"saved {_size(trace.saved_bytes)}; gradients: {trace.gradients_source}."
    )
    return "\n".join([*lines, *_columns([_HEADER, *_rows(trace)])])


def _rows(trace: Trace) -> list[tuple[str, ...]]:
    kinds = {block.label: block.kind for block in trace.blocks}
    cuts = {cut.before: cut for cut in trace.cuts}
    rows = []
    for call, is_outermost in _shown(trace.calls, kinds):
        if is_outermost:
            kind = str(kinds[call.label]) if call.label in kinds else ""
            crossing = _crossing(cuts[call.label]) if call.label in kinds else ""
            rows.append((call.label, kind, *_figures(call), crossing))
        if trace.blocks and call.label == trace.blocks[-1].label:
            rows.append(("(after the blocks)", "", "", "", "", "", _crossing(cuts[None])))
    return rows


def _shown(calls: Sequence[ModuleCall], kinds: dict[str, int]) -> list[tuple[ModuleCall, bool]]:
    """Which calls stand for what is inside of them: blocks, and what has no block and no call inside."""
    inside: int | None = None
    shown = []
    for position, call in enumerate(calls):
        if inside is not None and call.depth > inside:
            continue
        inside = call.depth if call.label in kinds else None
        is_leaf = position + 1 == len(calls) or calls[position + 1].depth <= call.depth
        shown.append((call, call.label in kinds or is_leaf))
    return shown


def _figures(call: ModuleCall) -> tuple[str, ...]:
    shapes = ", ".join("x".join(map(str, output.shape)) or "scalar" for output in call.outputs)
    return (shapes, _flops(call.forward_flops), _size(call.parameter_bytes), _size(call.added_bytes))


def _crossing(cut: Cut) -> str:
    return f"{_size(cut.num_bytes)} in {len(cut.tensors)}"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        cells = [f"{first[0]:<{first[1]}}", *(f"{text:>{width}}" for text, width in others)]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _flops(count: int | None) -> str:
    if count is None:
        return "? "
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} "


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "?"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"
