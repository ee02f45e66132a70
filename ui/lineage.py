"""A run's lineage as a drawing: across on a wide page, down on a narrow one. Where a run comes from is
katherine.lineage's."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from katherine.lineage import Lineage, Node
from katherine.recipe import KINDS
from ui import tones
from ui.component import HTML

# Pixels. A box holds a run's id at 12 px, and six of them, files to probes, fit a page of 1,280.
WIDE, GAP = 190, 18
# As wide as a phone of 390 leaves, and each level a little to the right.
NARROW, INDENT = 344, 14
LINE, PADDING, BETWEEN = 16, 8, 12
# Letters of about 6.2 px in such a box. What is cut is whole in the box's tooltip, and to a screen reader.
LETTER = 6.2


class Drawing(HTML):
    """value: what draw() gives. `drawing.select(handler)` hears a click on a run; `event.id` is the run's."""

    def __init__(self, **given: Any):
        super().__init__(
            "",
            html_template="<div class='k-lineage'>${value || ''}</div>",
            js_on_load="""
              const choose = (event) => {
                const box = event.target.closest("[data-run]");
                if (!box || (event.type === "keydown" && event.key !== "Enter" && event.key !== " ")) return;
                event.preventDefault();
                trigger("select", { id: box.dataset.run });
              };
              element.addEventListener("click", choose);
              element.addEventListener("keydown", choose);
            """,
            apply_default_css=False,
            **given,
        )


@dataclass(frozen=True, slots=True)
class _Box:
    node: Node
    x: float
    y: float
    width: float
    lines: tuple[str, ...]

    @property
    def height(self) -> float:
        return 2 * PADDING + LINE * len(self.lines)

    @property
    def middle(self) -> float:
        return self.y + self.height / 2


def draw(lineage: Lineage, kinds: Collection[str] = tuple(KINDS)) -> Markup:
    """Two pictures of the same, of which the style sheet shows the one that fits. All text is escaped. kinds: of runs
    that can be clicked."""
    across, down = _across(lineage), _down(lineage)
    return Markup("{}{}").format(
        _picture(lineage, across, [_curve(across[a], across[b]) for a, b in lineage.edges], "k-across", kinds),
        _picture(lineage, down, [_elbow(down[a], down[b]) for a, b in lineage.edges], "k-down", kinds),
    )


def _picture(lineage: Lineage, boxes: dict[str, _Box], edges: list[str], name: str, kinds: Collection[str]) -> Markup:
    width = max(box.x + box.width for box in boxes.values()) + 2
    height = max(box.y + box.height for box in boxes.values()) + 2
    lines = Markup().join(Markup('<path d="{}"/>').format(path) for path in edges)
    drawn = Markup().join(
        _drawn(box, box.node.id == lineage.of, box.node.is_run and box.node.kind in kinds) for box in boxes.values()
    )
    return Markup(
        '<svg class="{}" role="img" aria-label="Lineage of run {}" width="{:.0f}" height="{:.0f}" '
        'viewBox="-1 -1 {:.0f} {:.0f}"><desc>{}</desc><g class="k-edges">{}</g>{}</svg>'
    ).format(
        name, lineage.of, width, height, width, height, "; ".join(line.strip() for line in lineage.lines()), lines,
        drawn,
    )  # fmt: skip


def _drawn(box: _Box, chosen: bool, clickable: bool) -> Markup:
    node = box.node
    whole = ", ".join([f"{node.kind} {node.name}", *([node.state] if node.state else []), *node.facts])
    tone = tones.of(node.state)
    attributes = Markup(' data-run="{}" tabindex="0" role="link"').format(node.id) if clickable else Markup()
    texts = Markup().join(
        Markup('<text x="{:.0f}" y="{:.0f}" class="{}">{}</text>').format(
            box.x + PADDING, box.y + PADDING + LINE * (place + 0.75), "k-head" if place == 0 else "", text
        )
        for place, text in enumerate(box.lines)
    )
    return Markup(
        '<g class="k-box{}{}"{}><title>{}</title><rect x="{:.0f}" y="{:.0f}" width="{:.0f}" height="{:.0f}" rx="4"/>'
        "{}{}</g>"
    ).format(
        " k-chosen" if chosen else "",
        " k-run" if clickable else "",
        attributes,
        whole,
        box.x,
        box.y,
        box.width,
        box.height,
        texts,
        Markup('<circle class="k-{}" cx="{:.0f}" cy="{:.0f}" r="4"/>').format(
            tone, box.x + box.width - 11, box.y + PADDING + 8
        )
        if tone
        else "",
    )


def _text(node: Node, width: float) -> tuple[str, ...]:
    """The box's lines: kind and state, name, facts."""
    room = int((width - 2 * PADDING) / LETTER)
    if node.kind in ("files", "more"):
        lines = [node.name, *node.facts]
    elif node.kind == "dataset":
        lines = [" · ".join(["dataset", *([node.state] if node.state else [])]), node.name, ", ".join(node.facts)]
    else:
        kind = "run" if node.kind == "run" else node.kind
        lines = [f"{kind} · {node.state}", tones.short(node.name), *node.facts]
    return tuple(
        line if len(line) <= room - 2 * (place == 0) else line[: room - 3] + "…"
        for place, line in enumerate(lines)
        if line
    )


def _depths(lineage: Lineage) -> dict[str, int]:
    depths: dict[str, int] = {}
    for node in lineage.nodes:
        above = [depths[parent.id] for parent in lineage.parents(node.id) if parent.id in depths]
        depths[node.id] = max(above) + 1 if above else 0
    # A second dataset stands just before the run that learned from it, not at the far end.
    for node in reversed(lineage.nodes):
        if node.kind in ("files", "dataset") and (below := lineage.children(node.id)):
            depths[node.id] = max(depths[node.id], min(depths[child.id] for child in below) - 1)
    return depths


def _across(lineage: Lineage) -> dict[str, _Box]:
    depths = _depths(lineage)
    boxes: dict[str, _Box] = {}
    bottom: dict[int, float] = {}
    for node in lineage.in_depth():
        depth = depths[node.id]
        lines = _text(node, WIDE)
        parents = [boxes[parent.id] for parent in lineage.parents(node.id) if parent.id in boxes]
        height = 2 * PADDING + LINE * len(lines)
        # Level with what it comes from where there is room, else below its neighbours.
        wanted = parents[-1].middle - height / 2 if parents else 0.0
        y = max(wanted, bottom.get(depth, 0.0), 0.0)
        boxes[node.id] = _Box(node, depth * (WIDE + GAP), y, WIDE, lines)
        bottom[depth] = y + height + BETWEEN
    return boxes


def _down(lineage: Lineage) -> dict[str, _Box]:
    depths = _depths(lineage)
    boxes: dict[str, _Box] = {}
    y = 0.0
    for node in lineage.in_depth():
        x = INDENT * depths[node.id]
        box = _Box(node, x, y, NARROW - x, _text(node, NARROW - x))
        boxes[node.id] = box
        y += box.height + BETWEEN
    return boxes


def _curve(a: _Box, b: _Box) -> str:
    x, y, bend = a.x + a.width, a.middle, (b.x - a.x - a.width) / 2
    return f"M{x:.0f} {y:.0f}C{x + bend:.0f} {y:.0f} {b.x - bend:.0f} {b.middle:.0f} {b.x:.0f} {b.middle:.0f}"


def _elbow(a: _Box, b: _Box) -> str:
    x = a.x + INDENT / 2
    return f"M{x:.0f} {a.y + a.height:.0f}V{b.middle:.0f}H{b.x:.0f}"
