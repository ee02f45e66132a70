"""The publish tab: which export, what is there, approve, push, receipts, audit log. It decides nothing: approving is
katherine.approval's, pushing katherine.publish's, each in an errand that enforces what the page only shows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr
from markupsafe import Markup

from katherine import approval, manifests, reviews
from katherine.approval import Evidence, Standing
from katherine.errors import KatherineError, NotFound
from katherine.history import Seen
from katherine.manifests import Entry
from katherine.runs import State
from katherine.units import size
from ui import approving, files, pushing, runs, tones
from ui.approving import Approving
from ui.component import Choice
from ui.edge import message, shown
from ui.held import held
from ui.logbook import Logbook
from ui.panel import Live, Panel
from ui.pushing import Pushing
from ui.table import Cell, Table
from ui.told import Told
from ui.visitors import role

TITLE = "Publish"


class _Given(NamedTuple):
    """What comes with each call, in the order of the page's inputs. All of it is what a browser says."""

    export: str | None
    who: str | None
    note: str | None
    cover: list[str] | None
    target: str | None
    also: str | None
    receipt: str
    marks: dict[str, str] | None


class _Page:
    """The tab's components, and the handlers that fill them. It keeps nothing of a visitor."""

    def __init__(self, panel: Panel):
        self.panel = panel
        self.home = panel.home
        self.export = Choice([], value=None, label="Export", elem_id="publish-export")
        self.about = gr.HTML("", apply_default_css=False)
        with gr.Column(visible=False) as self.rest:
            gr.HTML("What is there", elem_classes="k-section")
            self.files = Table(
                ("Quant", "Passed checks", "Size#", "SHA-256", "Probes passed", "Approved"),
                "This export has no files.",
                elem_classes="k-lines",
            )
            self.seen = gr.HTML("", apply_default_css=False)
            self.approving = Approving()
            self.pushing = Pushing()
        self.log = Logbook()
        self.receipt = held("")
        self.marks = held({})

    @property
    def inputs(self) -> list[Any]:
        return [
            self.export, self.approving.who, self.approving.note, self.approving.cover, self.pushing.target,
            self.pushing.also, self.receipt, self.marks,
        ]  # fmt: skip

    @property
    def outputs(self) -> list[Any]:
        own = [self.export, self.about, self.rest, self.files, self.seen, self.approving.note, self.receipt, self.marks]
        return [*own, *self.approving.outputs, *self.pushing.outputs, *self.log.outputs]

    # ------------------------------------------------------------------------------------------------ handlers

    def refresh(self, *values: Any) -> Any:
        given = _Given(*values)
        return self._news(given, Told(given.marks)) or gr.skip()

    def approve(self, request: gr.Request, *values: Any) -> Any:
        given = _Given(*values)
        at = self._chosen(given)
        offer = approval.offer(self.home, at)
        self.approving.begin(self.home, at, given.who, role(request), given.note, given.cover, offer)
        return self._news(given, Told(given.marks)) | {self.approving.note: ""}

    def check(self, *values: Any) -> Any:
        given = _Given(*values)
        self.approving.verify(self.home, self._chosen(given))
        return self._news(given, Told(given.marks)) or gr.skip()

    def ask(self, *values: Any) -> Any:
        given = _Given(*values)
        reviews.name(given.who or "")
        told = Told(given.marks)
        told.visible("asking", self.approving.asking, True)
        return told.values | {self.marks: told.marks}

    def leave(self, *values: Any) -> Any:
        given = _Given(*values)
        told = Told(given.marks)
        told.visible("asking", self.approving.asking, False)
        return self._news(given, told) or gr.skip()

    def withdraw(self, request: gr.Request, *values: Any) -> Any:
        given = _Given(*values)
        approval.withdraw(
            self.home, self._chosen(given), who=given.who or "", role=role(request), note=given.note or ""
        )
        told = Told(given.marks)
        told.visible("asking", self.approving.asking, False)
        return self._news(given, told) | {self.approving.note: ""}

    def allow(self, request: gr.Request, allowed: bool, who: str | None, marks: dict[str, str] | None) -> Any:
        """A refusal is a warning here: after an error, the page would go on showing what was not granted."""
        try:
            approval.let_reviewers_approve(self.home, allowed, who=who or "", role=role(request))
        except KatherineError as error:
            gr.Warning(message(str(error)))
        told = Told(marks)
        now = approval.reviewers_may_approve(self.home)
        told.is_news("rights", now)
        return {self.approving.rights: now, self.marks: told.marks}

    def stop_approving(self, *values: Any) -> Any:
        given = _Given(*values)
        self.approving.end(self.home, _of(approving.errands_of(self.home, approving.KINDS), self._chosen(given)))
        return self._news(given, Told(given.marks)) or gr.skip()

    def push(self, request: gr.Request, *values: Any) -> Any:
        given = _Given(*values)
        self.pushing.begin(self.home, self._chosen(given), given.target, given.also, given.who, role(request))
        return self._news(given, Told(given.marks)) or gr.skip()

    def stop_pushing(self, *values: Any) -> Any:
        given = _Given(*values)
        self.pushing.end(self.home, approving.errands_of(self.home, (pushing.KIND,)))
        return self._news(given, Told(given.marks)) or gr.skip()

    def open_receipt(self, event: gr.EventData, *values: Any) -> Any:
        given = _Given(*values)
        receipt = pushing.chosen(self.home, self._chosen(given), str(event.id))
        return self._news(given._replace(receipt=receipt), Told(given.marks)) | {self.receipt: receipt}

    # ------------------------------------------------------------------------------------------------ parts

    def _chosen(self, given: "_Given") -> str:
        """The export's id, looked up: it comes from a page."""
        if not given.export:
            raise NotFound("There is no export yet. Export a trained run first, in the Export tab.")
        seen = self.panel.history.get(given.export)
        if seen.kind != "export":
            raise NotFound(f"Run {seen.id} is not an export.")
        return seen.id

    def _news(self, given: "_Given", told: Told) -> dict[Any, Any]:
        """Component → value, of those that are not what they were."""
        exports = [
            seen for seen in self.panel.history.runs() if seen.kind == "export" and seen.status.state is State.succeeded
        ]
        at = next((seen for seen in exports if seen.id == given.export), exports[0] if exports else None)
        told.tell(
            "export",
            self.export,
            [[seen.id for seen in exports], at.id if at else None],
            lambda: gr.update(
                choices=[(runs.option(self.panel.history, seen), seen.id) for seen in exports],
                value=at.id if at else None,
            ),
        )
        told.visible("rest", self.rest, at is not None)
        if at is None:
            told.say("about", self.about, _NOTHING)
        else:
            self._describe(told, at, given)
        self.log.show(told, self.home)
        return told.values | {self.marks: told.marks} if told.values else {}

    def _describe(self, told: Told, at: Seen, given: "_Given") -> None:
        standing, offer, problem = approving.asked(self.home, at.id)
        seen: Evidence | None = None
        try:
            seen = approval.evidence(self.home, at.id, self.panel.history)
        except KatherineError as error:
            problem = problem or str(error)
        about = _about(self.panel, at)
        told.say("about", self.about, about + Markup('<p class="k-bad">{}</p>').format(problem) if problem else about)
        rows = _files(at, standing, seen)
        told.tell("files", self.files, [at.id, rows], lambda: self.files.rows(rows))
        told.say("seen", self.seen, _seen(seen) if seen else Markup())
        mine = _of(approving.errands_of(self.home, approving.KINDS), at.id)
        self.approving.show(told, self.home, at.id, standing, offer, seen, given.cover or (), mine)
        pushes = approving.errands_of(self.home, (pushing.KIND,))
        self.pushing.show(told, self.home, at.id, standing, given.target, given.receipt, pushes)


_NOTHING = Markup('<p class="k-empty">{}</p>').format(
    "There is no export that could be published yet. Make one in the Export tab; once it has succeeded, it can be "
    "approved and pushed here."
)


def _of(found: Sequence[tuple[Any, Any]], export_id: str) -> list[tuple[Any, Any]]:
    return [(errand, status) for errand, status in found if errand.request.get("export") == export_id]


def _about(panel: Panel, at: Seen) -> Markup:
    facts = {
        "Result": panel.history.outcome(at).words(),
        "From": tones.short(at.run.record.parent or ""),
        "Dataset": at.run.record.dataset or "",
        "Made by": at.run.record.who,
    }
    return runs.described(facts.items())


def _files(at: Seen, standing: Standing | None, seen: Evidence | None) -> list[list[Any]]:
    try:
        entries = manifests.read(at.run).files
    except KatherineError:
        return []
    counts = {count.column: count for count in seen.probes[-1].counts} if seen and seen.probes else {}
    given = standing.approval if standing else None
    covered = {file.file: file.sha256 for file in given.files} if given else {}
    return [_file(at, entry, counts, covered, bool(standing and standing.valid)) for entry in entries]


def _file(at: Seen, entry: Entry, counts: dict[str, Any], covered: dict[str, str], valid: bool) -> list[Any]:
    passed = sum(check.passed for check in entry.checks)
    checks = f"{passed} of {len(entry.checks)}"
    count = counts.get(entry.quant)
    approved = covered.get(entry.file) == entry.sha256
    there = manifests.is_there(at.run, entry)
    return [
        Cell(entry.quant, link=files.address(at.id, f"gguf/{entry.file}") if there else "", whole=entry.file),
        Cell(checks if entry.accepted else f"NOT ACCEPTED, {checks}", tone="good" if entry.accepted else "bad"),
        Cell(size(entry.bytes), sort=entry.bytes) if there else Cell("gone or changed", sort=0, tone="bad"),
        Cell(entry.sha256[:12], whole=entry.sha256),
        Cell(f"{count.passed} of {count.asked}", sort=count.passed / (count.asked or 1))
        if count
        else Cell("", sort=""),
        Cell("yes" if valid else "void", tone="good" if valid else "bad") if approved else Cell("no", tone="dim"),
    ]


def _seen(seen: Evidence) -> Markup:
    """Probe runs, verdicts and recommendations, a line each."""
    lines = []
    for probe in reversed(seen.probes[-3:]):
        counts = ", ".join(f"{count.column} {count.passed} of {count.asked}" for count in probe.counts)
        lines.append(("Probes", f"{tones.short(probe.run)}, set {probe.set}: {counts}"))
    if not seen.probes:
        lines.append(("Probes", "none were run on this export. The Probes tab does it."))
    by = ", ".join(f"{name} {count}" for name, count in seen.verdicts.by.items())
    lines.append(("Verdicts", f"{seen.verdicts.count} ({by})" if by else "none. Reviewers give them on their page."))
    for word in seen.recommendations:
        liked = f", would take {word.column.rpartition(':')[2]}" if word.column else ""
        said = f": “{word.note}”" if word.note else ""
        lines.append(
            ("Recommendation", f"{word.reviewer}: {'it may go out' if word.good else 'NOT good enough'}{liked}{said}")
        )
    if not seen.recommendations:
        lines.append(("Recommendations", "none yet."))
    each = [Markup("<p><span class='k-dim'>{}</span> {}</p>").format(name, text) for name, text in lines]
    return Markup('<div class="k-seen">{}</div>').format(Markup().join(each))


def build(panel: Panel) -> Live:
    page = _Page(panel)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    part, push = page.approving, page.pushing
    pressed = (
        (part.approve, page.approve),
        (part.check, page.check),
        (part.withdraw, page.ask),
        (part.leave, page.leave),
        (part.sure, page.withdraw),
        (part.stop, page.stop_approving),
        (push.push, page.push),
        (push.stop, page.stop_pushing),
    )
    for button, handler in pressed:
        button.click(shown(handler), page.inputs, page.outputs, **quiet)
    for chosen in (page.export, part.cover):
        chosen.input(shown(page.refresh), page.inputs, page.outputs, trigger_mode="always_last", **quiet)
    part.rights.input(shown(page.allow), [part.rights, part.who, page.marks], [part.rights, page.marks], **quiet)
    push.receipts.select(shown(page.open_receipt), page.inputs, page.outputs, **quiet)
    return Live(page.refresh, page.outputs, page.inputs, every=2.0)
