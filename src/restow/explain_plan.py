"""What the plans of all ranks look like to people, and the same as plain values. It rejects nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from restow.checkpoint import Checkpoint
from restow.errors import show
from restow.explain import alike, family_name
from restow.layout import Layout, rows_text
from restow.ranks import Node, Rank
from restow.terminal import Answer, Line
from restow.wording import MARGIN, aligned, amount, field, many, runs_of

LISTED = 32  # ranks in full before a line stands for the rest


def rank_plans(
    opened: Checkpoint,
    layout: Layout,
    name: str,
    nodes: Sequence[Node],
    mesh: tuple[int, int],
    free: Sequence[str],
) -> Answer:
    """What every rank of a mesh reads."""
    sizes = {n: sum(p.end - p.begin for p in e.pieces) for n, e in opened.tensors.items()}
    total, experts = sum(sizes.values()), sum(sizes[n] for n in opened.expert_tensors)
    ranks = [rank for node in nodes for rank in node.ranks]
    summed = {
        n: sum(getattr(r, n) for r in ranks)
        for n in ("read", "wanted", "experts_read", "reads", "tiled", "seconds")
    }
    data = {
        "path": opened.path,
        "family": family_name(opened),
        "bytes": total,
        "expert_bytes": experts,
        "from": {m.path: "/".join(m.names) for m in opened.modules.values()},
        "into": {"layout": name, "rows": [str(row) for row in layout.rows]},
        "mesh": {"ep": mesh[0], "ep_shard": mesh[1]},
        "ranks": [rank._asdict() for rank in ranks],
        "totals": summed,
        "amplification": {
            "ranks_per_node": max(len(node.ranks) for node in nodes),
            "rank": max(_times(r.read, r.read - r.experts_read + r.wanted) for r in ranks),
            "node": max(_times(node.read, node.distinct) for node in nodes),
            "file_system": _times(summed["read"], total),
        },
        "free": list(free),
    }
    return Answer(data, _plan_lines(opened, layout, data, ranks))


def _plan_lines(
    opened: Checkpoint, layout: Layout, data: Mapping[str, Any], ranks: Sequence[Rank]
) -> Iterator[Line]:
    total, experts, sums = data["bytes"], data["expert_bytes"], data["totals"]
    mesh, name = data["mesh"], data["into"]["layout"]
    held = f"{many(len(opened.tensors), 'tensor')}, {amount(total)}, {amount(experts)} of them experts"
    yield Line(f"{show(opened.path)}: {data['family'] or 'unknown family'}, {held}", "head")
    for group in alike(opened):
        where = "; ".join(runs_of([m.path for m in group]))
        yield field("from", f"{' = '.join(group[0].names)}: {where}")
        yield from (Line(MARGIN + "  " + text) for text in rows_text(group[0].layout))
    yield field("into", name)
    yield from (Line(MARGIN + "  " + text) for text in rows_text(layout))
    second = f" x {mesh['ep_shard']} parts of the next dim" if mesh["ep_shard"] > 1 else ""
    first = f"{mesh['ep']} parts of e" if mesh["ep"] > 1 else "e whole"
    yield field("mesh", f"{first}{second}; all other tensors whole on every rank")
    yield Line()
    head = ("rank", "experts", "reads", "bytes", "of all", "straight", "in tiles")
    body = [_rank_cells(rank, total, mesh["ep_shard"]) for rank in ranks[:LISTED]]
    yield from aligned([head, *body])
    if len(ranks) > LISTED:
        rest = [rank.read for rank in ranks[LISTED:]]
        yield Line(f"  ... {len(rest):,} more ranks, {amount(min(rest))} to {amount(max(rest))} each")
    yield Line()
    share = f"{sums['experts_read'] / sums['wanted']:.2f} times" if sums["wanted"] else "none"
    once = (
        "each read once"
        if sums["experts_read"] == sums["wanted"] == experts
        else f"read {share}, gaps included,"
    )
    yield field("experts", f"{amount(experts)} in the files, {once} over {many(len(ranks), 'rank')}")
    yield field("in all", f"{amount(sums['read'])} in {sums['reads']:,} reads")
    times = data["amplification"]
    yield field(
        "amplified",
        f"{times['rank']:.2f} times what a rank needs, {times['node']:.2f} times on a node of "
        f"{many(times['ranks_per_node'], 'rank')}, {times['file_system']:.2f} times over the file system",
    )
    if sums["tiled"]:
        yield field(
            "order",
            f"{name} is not the files' order: its bytes pass through a tile in the cache on their way",
        )
        yield field("free", ", ".join(data["free"]) or "no layout keeps the files' order")
    else:
        yield field("order", f"{name} keeps the files' order: every byte is read into its place")
    lost = {n for rank in ranks for n in rank.missing}, {n for rank in ranks for n in rank.unused}
    for word, names in zip(("missing", "unused"), lost, strict=True):
        if names:
            yield Line(field(word, "; ".join(runs_of(sorted(names)))).text, "warn")
    yield field(
        "planned",
        f"in {sums['seconds']:.2f} s, {sums['seconds'] / len(ranks):.3f} s a rank; only headers were read",
    )


def _times(read: int, needed: int) -> float:
    return read / needed if needed else 1.0


def _rank_cells(rank: Rank, total: int, ep_shard: int) -> tuple[str, ...]:
    start, count = rank.experts
    held = f"{start}-{start + count - 1}" if count > 1 else str(start) if count else "none"
    at = f" ({rank.place[0]}, {rank.place[1]})" if ep_shard > 1 else ""
    share = f"{100 * rank.read / total:.1f} %" if total else "-"
    return (
        f"{rank.rank}{at}",
        held,
        f"{rank.reads:,}",
        amount(rank.read),
        share,
        amount(rank.straight),
        amount(rank.tiled),
    )
