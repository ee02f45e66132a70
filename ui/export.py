"""The export tab: a trained run into GGUF files, what each passed, what to take away. Exporting is a run's work,
reading exports back katherine.manifests'."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import gradio as gr
from markupsafe import Markup

from jobs import pipeline, queue
from katherine import drafts, lineage, manifests
from katherine import runs as run_folders
from katherine.errors import DataError, KatherineError, NotFound
from katherine.history import Seen
from katherine.manifests import Entry, Manifest
from katherine.recipe import ExportRecipe
from katherine.runs import ENDED, State
from katherine.units import duration, moment, size
from ui import files, runs, tones
from ui import lineage as drawings
from ui.edge import shown
from ui.held import held
from ui.panel import Live, Panel
from ui.table import Cell, Table
from ui.told import Told

TITLE = "Export"
WHO = "operator"
# As many types as a recipe names for a comparison; what is more is made by the button for all.
BUTTONS = 8


class _Page:
    """The tab's components and what they show. It keeps nothing of a visitor: what is chosen, and what was sent last,
    comes with each call."""

    def __init__(self, panel: Panel):
        self.panel = panel
        self.parent = gr.Dropdown(
            [], value=None, label="Trained run to export", allow_custom_value=True, elem_id="export-parent"
        )
        self.about = gr.HTML("")
        with gr.Row():
            self.buttons = [
                gr.Button("", visible=False, size="sm", min_width=190, scale=0, elem_classes="k-quant")
                for _ in range(BUTTONS)
            ]
            self.all = gr.Button("Export all", variant="primary", visible=False, size="sm", min_width=240, scale=0)
        with gr.Group(visible=False, elem_classes="k-again") as self.asking:
            self.question = gr.HTML("")
            with gr.Row():
                self.anyway = gr.Button("Export again", size="sm", min_width=140, scale=0)
                self.leave = gr.Button("Leave it", size="sm", min_width=120, scale=0)
        with gr.Row(equal_height=True):
            self.progress = gr.HTML("", elem_classes="k-under-way")
            self.stop = gr.Button("Stop", visible=False, variant="stop", size="sm", min_width=120, scale=0)
        gr.HTML("Exports", elem_classes="k-section")
        self.exports = Table(
            ("Run", "Of", "State", "Files", "Asked for"),
            "Nothing has been exported yet. Train a run, then choose a quant above.",
            selects=True,
            elem_classes=["k-lines", "k-chooses"],
        )
        with gr.Column(visible=False) as self.details:
            self.head = gr.HTML("")
            self.files = Table(
                (
                    "Quant", "Accepted", "Size#", "Bits a weight#", "Perplexity#", "KL, nats a token#", "Same top-1#",
                    "SHA-256", "Download",
                ),
                "This export has no files yet.",
                elem_classes="k-lines",
            )  # fmt: skip
            self.sums = gr.HTML("")
            gr.HTML("Acceptance: every check of every file", elem_classes="k-section")
            self.checks = Table(
                ("", "Check", "File", "Finding"), "Nothing has been checked yet.", elem_classes="k-checks"
            )
            self.parts = gr.HTML("")
            self.probes_title = gr.HTML("Probes", elem_classes="k-section", visible=False)
            self.probes = Table(("Model", "Passed#", "Of#"), "Not probed.", visible=False)
            self.answers = Table(("Question",), "No answers to compare.", visible=False, elem_classes="k-answers")
            gr.HTML("Where it comes from", elem_classes="k-section")
            self.drawing = drawings.Drawing()
            self.others = gr.HTML("")
        self.chosen = held("")
        # What was asked for and waits for a second word: (parent, quants).
        self.asked = held(None)
        self.marks = held({})

    @property
    def inputs(self) -> list[Any]:
        return [self.parent, self.chosen, self.asked, self.marks]

    @property
    def outputs(self) -> list[Any]:
        return [
            self.parent, self.about, *self.buttons, self.all, self.asking, self.question, self.progress, self.stop,
            self.exports, self.details, self.head, self.files, self.sums, self.checks, self.parts, self.probes_title,
            self.probes, self.answers, self.drawing, self.others, self.chosen, self.asked, self.marks,
        ]  # fmt: skip

    # ------------------------------------------------------------------------------------------------ handlers

    def refresh(self, parent: str | None, chosen: str, asked: Any, marks: dict[str, str] | None) -> Any:
        return self._news(parent, chosen, asked, marks) or gr.skip()

    def ask(self, place: int | None) -> Any:
        """The handler of a button: the quant at that place, or all that the recipe names."""

        def asked_for(parent: str | None, chosen: str, asked: Any, marks: dict[str, str] | None) -> Any:
            if not parent:
                raise NotFound("There is no trained run to export. Train one first.")
            made = self._recipe()
            quants = list(made.quants) if place is None else [manifests.offers(made)[place]]
            values = manifests.with_quants(made, quants)
            before = manifests.made_before(self.panel.history.runs(), parent, values)
            if before:
                return self._news(parent, chosen, [parent, quants], marks) | {self.asked: [parent, quants]}
            return self._start(parent, quants, marks)

        return asked_for

    def again(self, parent: str | None, chosen: str, asked: Any, marks: dict[str, str] | None) -> Any:
        if not asked:
            return gr.skip()
        return self._start(asked[0], asked[1], marks)

    def leave_it(self, parent: str | None, chosen: str, asked: Any, marks: dict[str, str] | None) -> Any:
        return self._news(parent, chosen, None, marks) | {self.asked: None}

    def choose(
        self, parent: str | None, chosen: str, asked: Any, marks: dict[str, str] | None, event: gr.EventData
    ) -> Any:
        run_id = self.panel.history.get(str(event.id)).id
        return self._news(parent, run_id, asked, marks) | {self.chosen: run_id}

    def end(self, parent: str | None, chosen: str, asked: Any, marks: dict[str, str] | None) -> Any:
        """Stops the export under way; asked a second time, ends it at once."""
        if going := _under_way(self.panel.history.runs()):
            queue.stop(self.panel.home, going[0].id, kill=going[0].status.state is State.stopping)
        return self._news(parent, chosen, asked, marks) or gr.skip()

    def _start(self, parent: str, quants: Sequence[str], marks: dict[str, str] | None) -> Any:
        recipe = manifests.with_quants(self._recipe(), quants)
        (run,) = pipeline.start_on(self.panel.home, parent, {"export": recipe}, WHO)
        return self._news(parent, run.id, None, marks) | {self.chosen: run.id, self.asked: None}

    def _recipe(self) -> ExportRecipe:
        made = drafts.load(self.panel.home).recipe("export")
        assert isinstance(made, ExportRecipe)
        return made

    # ------------------------------------------------------------------------------------------------ parts

    def _news(self, parent: str | None, chosen: str, asked: Any, marks: dict[str, str] | None) -> dict[Any, Any]:
        """Component → value, of those that are not what they were."""
        told = Told(marks)
        everyone = self.panel.history.runs()
        exports = [seen for seen in everyone if seen.kind == "export"]
        self._offer(told, parent, asked, everyone)
        self._follow(told, exports)
        by_id = {seen.id: seen for seen in exports}
        seen = by_id.get(chosen) or (exports[0] if exports else None)
        rows = [
            [
                tones.short(each.id),
                tones.short(each.run.record.parent or ""),
                runs.state(each),
                self.panel.history.outcome(each).words(),
                Cell(moment(each.run.record.created), sort=each.run.record.created),
            ]
            for each in exports
        ]
        ids = [each.id for each in exports]
        told.tell(
            "exports",
            self.exports,
            [rows, seen.id if seen else ""],
            lambda: self.exports.rows(rows, ids, selected=seen.id if seen else None),
        )
        told.visible("details", self.details, bool(seen))
        if seen:
            self._describe(told, seen, everyone)
        return told.values | {self.marks: told.marks} if told.values else {}

    def _offer(self, told: Told, parent: str | None, asked: Any, everyone: Sequence[Seen]) -> None:
        trained = manifests.trained(everyone)
        by_id = {seen.id: seen for seen in trained}
        at = by_id.get(parent or "") or (trained[0] if trained else None)
        told.tell(
            "parent",
            self.parent,
            [[seen.id for seen in trained], at.id if at else None],
            lambda: gr.update(
                choices=[(runs.option(self.panel.history, seen), seen.id) for seen in trained],
                value=at.id if at else None,
            ),
        )
        made = self._recipe()
        offers = manifests.offers(made)
        room = manifests.room(self.panel.home, at.run, made) if at else None
        sizes = room.sizes if room and room.sizes else {}
        for place, button in enumerate(self.buttons):
            quant = offers[place] if at and place < len(offers) else ""
            label = f"{quant} · about {size(sizes[quant])}" if quant in sizes else quant
            told.tell(f"button {place}", button, label, partial(gr.update, value=label, visible=bool(label)))
        total = sum(sizes.get(quant, 0) for quant in made.quants)
        label = f"All {len(made.quants)} of the recipe" + (f" · about {size(total)}" if total else "")
        told.tell("all", self.all, [label, bool(at)], lambda: gr.update(value=label, visible=bool(at)))
        told.say("about", self.about, self._about(at, made, room))
        waits = asked and at and asked[0] == at.id
        told.visible("asking", self.asking, bool(waits))
        if waits:
            told.say("question", self.question, self._made_before(asked[0], manifests.with_quants(made, asked[1])))

    def _about(self, at: Seen | None, made: ExportRecipe, room: manifests.Room | None) -> Markup:
        if at is None or room is None:
            return Markup('<p class="k-empty">{}</p>').format(
                "There is no trained run yet. Prepare a dataset, then start a run in the Train tab; it can be exported "
                "once it has succeeded."
            )
        record = at.run.record
        facts = {
            "Result": self.panel.history.outcome(at).words(),
            "Dataset": record.dataset or "",
            "Checks": f"{made.check_examples} examples, KL at most {made.max_kl:g} nats a token (Recipe tab)",
            "Needs": "" if room.fullest is None else f"about {size(room.fullest)} at its fullest",
            "Free": size(room.free) if room.quota_known else "see your quota: the volume tells the whole cluster",
        }
        said = runs.described(facts.items())
        if room.is_enough is False:
            said += Markup('<p class="k-bad">{}</p>').format(
                "There is not enough room for this export: it will be refused when it begins. Remove what is no longer "
                "needed, or ask for fewer quants at a time."
            )
        if room.sizes is None:
            said += Markup('<p class="k-dim">{}</p>').format(
                "The base is not on this machine, so sizes are not known beforehand."
            )
        note = "A single quant makes an export of its own; merging and converting are done again for it."
        return said + Markup('<p class="k-dim k-note">{}</p>').format(note)

    def _made_before(self, parent: str, values: dict[str, Any]) -> Markup:
        before = manifests.made_before(self.panel.history.runs(), parent, values)
        each = ", ".join(f"{quant} by {tones.short(seen.id)}" for quant, seen in before.items())
        rest = [quant for quant in values["quants"] if quant not in before]
        also = f" Not yet: {', '.join(rest)}." if rest else ""
        return Markup("<p>Already exported from this run with the same settings: {}.{}</p>").format(each, also)

    def _follow(self, told: Told, exports: Sequence[Seen]) -> None:
        going = _under_way(exports)
        told.say("progress", self.progress, Markup().join(_line(seen) for seen in going))
        label = ""
        if going:
            label = "End it now" if going[0].status.state is State.stopping else "Stop"
        told.tell("stop", self.stop, label, lambda: gr.update(value=label or "Stop", visible=bool(label)))

    def _describe(self, told: Told, seen: Seen, everyone: Sequence[Seen]) -> None:
        history = self.panel.history
        head = runs.head(seen, history.outcome(seen)) + runs.downloads(seen, leave_out=("gguf/",))
        manifest: Manifest | None = None
        try:
            manifest = manifests.read(seen.run) if seen.status.state is State.succeeded else None
        except (NotFound, DataError) as error:
            head += Markup('<p class="k-bad">{}</p>').format(str(error))
        told.say("head", self.head, head)
        rows = [_file(seen, entry) for entry in manifest.files] if manifest else []
        told.tell("files", self.files, [seen.id, rows], lambda: self.files.rows(rows))
        told.say("sums", self.sums, _sums(manifest))
        checks = _checks(manifest) if manifest else []
        told.tell("checks", self.checks, checks, lambda: self.checks.rows(checks))
        told.say("parts", self.parts, _parts(manifest))
        self._probed(told, seen, everyone)
        line = lineage.trace(self.panel.home, history, seen.id, everyone)
        told.say("lineage", self.drawing, drawings.draw(line, ("export",)))
        told.say("others", self.others, Markup('<p class="k-dim k-note">Other runs have their page in History.</p>'))

    def _probed(self, told: Told, seen: Seen, everyone: Sequence[Seen]) -> None:
        """Of the newest probe run on this export that succeeded."""
        probe = next(
            (
                each
                for each in everyone
                if (each.kind, each.run.record.parent, each.status.state) == ("probe", seen.id, State.succeeded)
            ),
            None,
        )
        result: dict[str, Any] = {}
        if probe and not self.panel.history.outcome(probe).damage:
            try:
                result = run_folders.result(probe.run)
            except (KatherineError, OSError, ValueError):
                result = {}
        told.visible("probes title", self.probes_title, bool(result))
        # Without those that no rule decides; the Probes tab has them, and every answer.
        counts = [
            [model, *(Cell(str(count), sort=count) for count in (found["passed"], found["asked"] - undecided))]
            for model, found in result.get("models", {}).items()
            for undecided in (found.get("undecided", 0),)
        ]
        told.tell(
            "probes",
            self.probes,
            [seen.id, counts],
            lambda: gr.update(value=self.probes.rows(counts), visible=bool(counts)),
        )
        answers: dict[str, dict[str, str]] = result.get("answers", {})
        models = list(dict.fromkeys(model for given in answers.values() for model in given))
        said = [[question, *(given.get(model, "") for model in models)] for question, given in answers.items()]
        told.tell(
            "answers",
            self.answers,
            [seen.id, models, said],
            lambda: gr.update(value=self.answers.rows(said) | {"columns": ["Question", *models]}, visible=bool(said)),
        )


def _under_way(among: Sequence[Seen]) -> list[Seen]:
    """Exports that have not ended: the one that is carried out first, then those that wait, oldest first."""
    going = [seen for seen in reversed(among) if seen.kind == "export" and seen.status.state not in ENDED]
    return sorted(going, key=lambda seen: seen.status.state is State.queued)


def _line(seen: Seen) -> Markup:
    """An export that has not ended: where it is, or why it waits."""
    status = seen.status
    what = ", ".join(seen.run.record.recipe.get("quants", ()))
    if status.state is State.queued:
        where = status.reason or "waits for its turn"
        return Markup('<p class="k-dim">{} ({}): {}</p>').format(tones.short(seen.id), what, where)
    step = f", {status.step:,} of {status.of:,}" if status.of else ""
    stopping = " · stopping after this part" if status.state is State.stopping else ""
    share = status.step / status.of if status.of else 0.0
    # Whole tens of seconds: the page is sent only what changed.
    spent = duration(status.seconds // 10 * 10)
    return Markup(
        '<p><span class="k-tone k-busy">{}</span> ({}): {}{}{} <span class="k-dim">{}</span></p>'
        '<progress max="1" value="{:.3f}"></progress>'
    ).format(tones.short(seen.id), what, status.phase, step, stopping, spent, share)


def _number(value: float | None, form: str) -> Cell:
    return Cell("", sort="") if value is None else Cell(format(value, form), sort=value)


def _file(seen: Seen, entry: Entry) -> list[Any]:
    there = manifests.is_there(seen.run, entry)
    accepted = Cell("yes", tone="good") if entry.accepted else Cell("NO", tone="bad")
    return [
        entry.quant,
        accepted,
        Cell(size(entry.bytes), sort=entry.bytes),
        _number(entry.bits_per_weight, ".2f"),
        _number(entry.perplexity, ".3f"),
        _number(entry.kl, ".4f"),
        _number(entry.top1, ".1%"),
        Cell(entry.sha256[:12], whole=entry.sha256),
        Cell(entry.file, link=files.address(seen.id, f"gguf/{entry.file}"))
        if there
        else Cell(f"{entry.file} is gone or changed", tone="bad"),
    ]


def _sums(manifest: Manifest | None) -> Markup:
    """As sha256sum -c reads them."""
    if not manifest or not manifest.files:
        return Markup()
    lines = "\n".join(f"{entry.sha256}  {entry.file}" for entry in manifest.files)
    return Markup(
        '<details class="k-sums"><summary>Checksums, to check a download with sha256sum -c</summary><pre>{}</pre>'
        "</details>"
    ).format(lines)


def _checks(manifest: Manifest) -> list[list[Any]]:
    """A row for each check and finding, the failed ones first; files with the same finding share a row."""
    found: dict[tuple[str, bool, str], list[str]] = {}
    entries = list(manifest.files)
    if all(entry.file != manifest.unquantised.file for entry in entries):
        entries.append(manifest.unquantised)
    for entry in entries:
        for check in entry.checks:
            found.setdefault((check.name, check.passed, check.finding), []).append(entry.quant)
    everyone = len(entries)
    rows = [
        [
            Cell("passed", tone="good") if passed else Cell("FAILED", tone="bad"),
            name.replace("_", " "),
            "all" if len(quants) == everyone else ", ".join(quants),
            finding,
        ]
        for (name, passed, finding), quants in found.items()
    ]
    order = [row[1] for row in rows]
    return sorted(rows, key=lambda row: (row[0].tone != "bad", order.index(row[1])))


def _parts(manifest: Manifest | None) -> Markup:
    """Drift, and where the time went."""
    if not manifest:
        return Markup()
    drift = manifest.drift
    said = ""
    if isinstance(kl := drift.get("kl"), int | float) and isinstance(top1 := drift.get("top1"), int | float):
        said = f"{kl:.5f} nats a token from base and adapter, the same top-1 at {top1:.1%}"
    facts = {"Merged": said} | {part: duration(seconds) for part, seconds in manifest.seconds.items()}
    return runs.described(facts.items())


def build(panel: Panel) -> Live:
    page = _Page(panel)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    for place, button in enumerate(page.buttons):
        button.click(shown(page.ask(place)), page.inputs, page.outputs, **quiet)
    page.all.click(shown(page.ask(None)), page.inputs, page.outputs, **quiet)
    page.anyway.click(shown(page.again), page.inputs, page.outputs, **quiet)
    page.leave.click(shown(page.leave_it), page.inputs, page.outputs, **quiet)
    page.stop.click(shown(page.end), page.inputs, page.outputs, **quiet)
    page.parent.input(shown(page.refresh), page.inputs, page.outputs, **quiet)
    page.exports.select(shown(page.choose), page.inputs, page.outputs, **quiet)
    page.drawing.select(shown(page.choose), page.inputs, page.outputs, **quiet)
    return Live(page.refresh, page.outputs, page.inputs, every=2.0)
