"""The browser of a dataset's examples: pages, a search, and each example as training sees it. Reading, searching and
rendering are katherine.browse's."""

from dataclasses import asdict
from typing import Any

import gradio as gr
from markupsafe import Markup

from katherine import browse, recipe, rendering, shelf
from katherine.browse import Cursor, Found
from katherine.examples import Preference
from katherine.rendering import Piece, Rendered
from katherine.shelf import Summary
from ui.edge import shown
from ui.held import held
from ui.panel import Panel

# Examples a page: as many as fit on a screen or two.
COUNT = 5
# Seconds that a page waits for a tokenizer that is still being read; then it shows the texts, and comes again.
PATIENCE = 0.2
_KINDS = {"Conversations": "sft", "Pairs": "dpo"}


class Examples:
    """The components, and what they do. `place` is where the browser is: kind, search, and the cursors of the pages so
    far, the last one being that of the page that is shown."""

    def __init__(self, panel: Panel, memory: gr.BrowserState):
        self.home = panel.home
        self.renderer = panel.renderer
        self.memory = memory
        self.place = held({})
        with gr.Row(equal_height=True):
            self.kind = gr.Radio(choices=list(_KINDS), value="Conversations", show_label=False, min_width=220)
            self.search = gr.Textbox(
                placeholder="Search the texts, then press Enter", show_label=False, max_lines=1, min_width=200, scale=2
            )
            self.previous = gr.Button("Previous", min_width=120, scale=0)
            self.next = gr.Button("Next", min_width=120, scale=0)
        self.where = gr.HTML(elem_classes="kd-note")
        gr.HTML(
            "<p class='kd-legend'><span class='kd-learned'>learned: carries loss</span> <span>read, not learned</span> "
            "<span class='kd-control'>control token</span></p>"
        )
        self.cards = gr.HTML(elem_classes="kd-cards")
        given: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        outputs = self.outputs
        for event in (self.kind.change, self.search.submit):
            event(shown(self.begin), [memory, self.kind, self.search], outputs, **given)
        self.next.click(shown(self.forward), [memory, self.place], outputs, **given)
        self.previous.click(shown(self.back), [memory, self.place], outputs, **given)

    @property
    def outputs(self) -> list[Any]:
        return [self.place, self.where, self.cards, self.previous, self.next]

    def begin(self, memory: dict[str, Any] | None, kind: str, search: str) -> dict[Any, Any]:
        """From the first example. memory: `dataset` in it is the id."""
        place = {"kind": _KINDS[kind], "search": (search or "").strip(), "cursors": [asdict(Cursor())]}
        return self.page((memory or {}).get("dataset"), place)

    def forward(self, memory: dict[str, Any] | None, place: dict[str, Any]) -> dict[Any, Any]:
        if not place or not place.get("next"):
            return {self.place: place}
        return self.page((memory or {}).get("dataset"), place | {"cursors": [*place["cursors"], place["next"]]})

    def back(self, memory: dict[str, Any] | None, place: dict[str, Any]) -> dict[Any, Any]:
        if not place or len(place["cursors"]) < 2:
            return {self.place: place}
        return self.page((memory or {}).get("dataset"), place | {"cursors": place["cursors"][:-1]})

    def page(self, dataset_id: str | None, place: dict[str, Any]) -> dict[Any, Any]:
        """The page at the place's last cursor."""
        if not dataset_id:
            return {self.place: {}, self.where: "", self.cards: ""}
        summary = shelf.summary(self.home, dataset_id)
        page = browse.page(summary.path, place["kind"], Cursor(**place["cursors"][-1]), place["search"], COUNT)
        base = summary.base or recipe.SftRecipe.model_fields["base"].default
        shown_here = [found.example for found in page.found]
        answer = self.renderer.render(base, shown_here, PATIENCE) if shown_here else None
        rendered = answer.rendered if answer else [rendering.plain(example) for example in shown_here]
        cards = [_card(found, each, _limit(summary)) for found, each in zip(page.found, rendered, strict=True)]
        reading = answer is None and bool(shown_here)
        by = f"Reading the tokenizer of {base}…" if reading else answer.remark if answer else ""
        if answer and answer.base and not answer.remark:
            by = f"Rendered and counted as {answer.base} does."
        place = place | {"next": asdict(page.next) if page.next else None, "pending": reading}
        return {
            self.place: place,
            self.where: Markup("<p class='k-dim'>{} {}</p>").format(_where(summary, place, page), by),
            self.cards: Markup("").join(cards) or Markup("<p class='k-empty'>{}</p>").format(_nothing(place, page)),
            self.previous: gr.Button(interactive=len(place["cursors"]) > 1),
            self.next: gr.Button("Search on" if not page.in_time else "Next", interactive=page.next is not None),
        }

    def refresh(self, dataset_id: str | None, place: dict[str, Any]) -> dict[Any, Any]:
        """Once more, where a tokenizer was still being read and now is there."""
        return self.page(dataset_id, place) if place and place.get("pending") else {}


def _limit(summary: Summary) -> int:
    return summary.report["options"]["max_length"]


def _where(summary: Summary, place: dict[str, Any], page: browse.Page) -> str:
    report = summary.report
    total = report["sft"]["unique"] if place["kind"] == "sft" else report["dpo"]["used"]
    if place["search"]:
        looked = "everything looked through" if page.next is None else f"{page.searched:.0%} looked through"
        return f"{looked}, {total:,} in all."
    if not page.found:
        return ""
    return f"{page.found[0].number:,} to {page.found[-1].number:,} of {total:,}."


def _nothing(place: dict[str, Any], page: browse.Page) -> str:
    if not place["search"]:
        return "This dataset has none of these."
    if page.next is not None:
        return f"Nothing so far holds “{place['search']}”. Press “Search on”."
    return f"Nothing {'more ' if len(place['cursors']) > 1 else ''}holds “{place['search']}”."


def _card(found: Found, rendered: Rendered, limit: int) -> Markup:
    tags = ""
    if isinstance(found.example, Preference):
        tags = " · ".join(tag for tag in (found.example.category, found.example.type) if tag) or "uncurated"
    if rendered.tokens is None:
        tokens, tone = "texts only, not rendered", "k-dim"
    elif rendered.tokens > limit:
        tokens, tone = f"{rendered.tokens:,} tokens: over the max length of {limit:,}, so left out", "k-warn"
    else:
        tokens, tone = f"{rendered.tokens:,} tokens", "k-dim"
    parts = Markup("").join(
        Markup("<div class='kd-part'>{}<pre>{}</pre></div>").format(
            "" if name == "conversation" else Markup("<b>{}</b>").format(name),
            Markup("").join(_piece(piece) for piece in pieces),
        )
        for name, pieces in rendered.parts.items()
    )
    return Markup(
        "<article class='kd-card'><header><b>{:,}</b> <span class='{}'>{}</span> <span class='k-dim'>{}</span></header>"
        "{}</article>"
    ).format(found.number, tone, tokens, tags, parts)


def _piece(piece: Piece) -> Markup:
    classes = " ".join(name for name, on in (("kd-learned", piece.learned), ("kd-control", piece.control)) if on)
    # A screen reader, and an eye that sees no colours, are told by the element: what is learned is marked.
    tag = "mark" if piece.learned else "span"
    return Markup("<{} class='{}'>{}</{}>").format(Markup(tag), classes, piece.text, Markup(tag))
