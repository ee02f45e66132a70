"""The probes tab: sets of questions, which columns are asked them, and what came of it. Sets are katherine.probesets',
asking a run's work, reading one back katherine.scorecard's."""

from collections.abc import Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from jobs import pipeline, queue
from katherine import columns, drafts, probes, probesets, scorecard
from katherine.columns import Column
from katherine.errors import KatherineError, NotFound
from katherine.history import Seen
from katherine.probes import Answer
from katherine.probesets import ProbeSet
from katherine.recipe import ProbeRecipe
from katherine.runs import ENDED, State
from katherine.scorecard import Difference, Row, Scorecard
from katherine.units import duration, moment, size
from ui import files, tones
from ui import runs as described
from ui.component import Choice
from ui.edge import shown
from ui.held import held
from ui.panel import Live, Panel
from ui.table import Cell, Table
from ui.told import Told

TITLE = "Probes"
WHO = "operator"
# A question in a table; the whole of it is at the pointer, and in the answers.
QUESTION = 90
_TONES = {"passed": "good", "failed": "bad", "for the reviewer": "warn"}
# Failed first, then what a person has to judge.
_ORDER = {"failed": 0.0, "for the reviewer": 1.0, "passed": 2.0}

_HOW = Markup(
    "<details class='k-how'><summary>How answers are scored, and how far the figures carry</summary>"
    "<p>Every probe declares its rules: patterns that an answer must match or must not, and how long it may be. Beside "
    "them each answer has to say something, to end by itself, and to show no thinking. It passes if all of them hold. "
    "Nothing else judges: no other model, and no list that is not in the set. A probe without a rule of its own is for "
    "the reviewer, and counts as neither passed nor failed; so is an answer on which a rule found no end.</p>"
    "<p>Of a longer talk the last answer is scored; the earlier ones are the model's own.</p>"
    "<p>Behind each count stands the range in which the rate lies with 95% confidence (Wilson's interval), were other "
    "questions of the same kind asked: with few questions it is wide. Two columns are compared on the questions that "
    "rules decided for both: only those count that one passed and the other failed. p is how often chance alone would "
    "make so large a difference (McNemar's exact test), raised for as many comparisons as the table has (Holm). Under "
    "0.05 it is usually taken seriously; a large p does not say that two are equal.</p></details>"
)


class _Page:
    """The tab's components and what they show. It keeps nothing of a visitor: what is chosen, and what was sent last,
    comes with each call."""

    def __init__(self, panel: Panel):
        self.panel = panel
        with gr.Row():
            self.set = Choice([], label="Probe set", min_width=200, elem_id="probe-set")
            self.export = Choice([], label="Export", min_width=260, elem_id="probe-export")
        self.columns = Choice([], multiselect=True, label="Columns to ask", elem_id="probe-columns")
        with gr.Row(equal_height=True):
            self.stages = gr.Checkbox(
                False,
                label="The base and the adapters too",
                info="Only the probes marked compare; slow without a GPU.",
                min_width=260,
            )
            self.ask = gr.Button("Ask all", variant="primary", min_width=160, scale=0)
        self.about = gr.HTML("")
        with gr.Row(equal_height=True):
            self.progress = gr.HTML("", elem_classes="k-under-way")
            self.stop = gr.Button("Stop", visible=False, variant="stop", size="sm", min_width=120, scale=0)
        with gr.Accordion("The probes of this set, and editing them", open=False):
            self.described = gr.HTML("")
            self.probes = Table(
                ("Probe", "Category", "Question", "Rules", "Why"),
                "This set cannot be read: edit it to see why.",
                elem_classes="k-set",
            )
            with gr.Row():
                self.edit = gr.Button("Edit", size="sm", min_width=120, scale=0)
                self.delete = gr.Button("Delete …", visible=False, size="sm", min_width=120, scale=0)
            with gr.Group(visible=False, elem_classes="k-again") as self.condemned:
                self.question = gr.HTML("")
                with gr.Row():
                    self.delete_now = gr.Button("Delete it", variant="stop", size="sm", min_width=120, scale=0)
                    self.keep = gr.Button("Leave it", size="sm", min_width=120, scale=0)
            with gr.Column(visible=False, elem_classes="k-editor") as self.editor:
                self.text = gr.Code(
                    "", language=None, label="The set as text", lines=18, max_lines=30, interactive=True,
                    elem_id="probe-text",
                )  # fmt: skip
                self.wrong = gr.HTML("")
                with gr.Row(elem_classes="k-saving"):
                    self.name = gr.Textbox(
                        label="Save under the name",
                        info="Another name makes a new set, and leaves this one as it is.",
                        max_lines=1,
                        min_width=240,
                        elem_id="probe-name",
                    )
                    self.save = gr.Button("Save", variant="primary", size="sm", min_width=110, scale=0)
                    self.check = gr.Button("Check only", size="sm", min_width=110, scale=0)
                    self.close = gr.Button("Close", size="sm", min_width=110, scale=0)
        gr.HTML("Runs", elem_classes="k-section")
        self.runs = Table(
            ("Run", "Set", "Export", "State", "Result", "Asked for"),
            "Nothing has been asked yet. Choose an export above, then “Ask all”.",
            selects=True,
            elem_classes="k-lines",
        )
        with gr.Column(visible=False) as self.results:
            self.head = gr.HTML("")
            gr.HTML("Passed, with the 95% range", elem_classes="k-section")
            self.rates = Table(("Category",), "No answer yet.", elem_classes="k-lines")
            gr.HTML("Every probe: choose one to read the answers", elem_classes="k-section")
            self.matrix = Table(("Probe",), "No answer yet.", selects=True, elem_classes="k-matrix")
            self.answers = gr.HTML("", elem_classes="k-probe-answers")
            gr.HTML("Differences between the columns", elem_classes="k-section")
            self.differences = Table(
                ("Columns", "In common#", "Only the first passed", "Only the second passed", "Read it as"),
                "It takes two columns that were asked the same.",
            )
            gr.HTML("Against an earlier run", elem_classes="k-section")
            self.past = Choice([], label="Compare with", min_width=260, elem_id="probe-past")
            self.past_note = gr.HTML("")
            self.against = Table(
                ("Column", "In common#", "Passed then#", "Passed now#", "Failed since", "Passed since", "Read it as"),
                "Choose a run above. Columns of the same name are compared, on probes with the same id and question.",
            )
            gr.HTML(_HOW)
        self.chosen = held("")
        self.probe = held("")
        # The text that is being edited: {"name", "sha256"} of what it began from, None while nothing is.
        self.editing = held(None)
        self.marks = held({})

    @property
    def inputs(self) -> list[Any]:
        return [self.set, self.export, self.columns, self.past, self.chosen, self.probe, self.marks]

    @property
    def outputs(self) -> list[Any]:
        return [
            self.set, self.export, self.columns, self.ask, self.about, self.progress, self.stop, self.described,
            self.probes, self.delete, self.runs, self.results, self.head, self.rates, self.matrix, self.answers,
            self.differences, self.past, self.past_note, self.against, self.chosen, self.probe, self.marks,
        ]  # fmt: skip

    @property
    def editing_outputs(self) -> list[Any]:
        return [
            *self.outputs,
            self.editor,
            self.text,
            self.wrong,
            self.name,
            self.editing,
            self.condemned,
            self.question,
        ]

    # ------------------------------------------------------------------------------------------------ asking

    def refresh(self, *given: Any) -> Any:
        return self._news(*given) or gr.skip()

    def of_export(
        self, name: str, export: str, picked: Any, past: str, chosen: str, probe: str, marks: dict[str, str] | None
    ) -> Any:
        """Another export was chosen: its own files are the columns to begin with."""
        marks = {part: mark for part, mark in (marks or {}).items() if part != "columns"}
        return self._news(name, export, None, past, chosen, probe, marks)

    def begin(
        self, stages: bool, name: str, export: str, picked: Any, past: str, chosen: str, probe: str, marks: Any
    ) -> Any:
        if not export:
            raise NotFound("There is no export to ask. Export a trained run first.")
        if not picked and not stages:
            raise NotFound("No column is chosen: choose at least one to ask.")
        home = self.panel.home
        asked = {"probes": self._known(name), "stages": bool(stages)}
        asked |= probes.asked_of(home, self.panel.history.get(export).run, picked or [])
        values = self._recipe().model_dump(mode="json") | asked
        (run,) = pipeline.start_on(home, export, {"probe": values}, WHO)
        return self._news(name, export, picked, past, run.id, "", marks) | {self.chosen: run.id, self.probe: ""}

    def end(self, *given: Any) -> Any:
        """Stops the run under way; asked a second time, ends it at once."""
        if going := _under_way(self.panel.history.runs()):
            queue.stop(self.panel.home, going[0].id, kill=going[0].status.state is State.stopping)
        return self._news(*given) or gr.skip()

    def choose_run(
        self, name: str, export: str, picked: Any, past: str, chosen: str, probe: str, marks: Any, event: gr.EventData
    ) -> Any:
        run_id = self.panel.history.get(str(event.id)).id
        return self._news(name, export, picked, past, run_id, "", marks) | {self.chosen: run_id, self.probe: ""}

    def choose_probe(
        self, name: str, export: str, picked: Any, past: str, chosen: str, probe: str, marks: Any, event: gr.EventData
    ) -> Any:
        return self._news(name, export, picked, past, chosen, str(event.id), marks) | {self.probe: str(event.id)}

    # ------------------------------------------------------------------------------------------------ sets

    def open_editor(self, *given: Any) -> dict[Any, Any]:
        name = self._known(given[0])
        text = probesets.text(self.panel.home, name)
        return {
            self.editor: gr.update(visible=True),
            self.text: text,
            self.wrong: self._check(name, text),
            self.name: name if probesets.is_own(name) else "",
            self.editing: {"name": name, "sha256": probesets.sha256(text)},
        }

    def close_editor(self) -> dict[Any, Any]:
        return {self.editor: gr.update(visible=False), self.wrong: Markup(), self.editing: None}

    def look_over(self, text: str | None, name: str) -> dict[Any, Any]:
        return {self.wrong: self._check(name.strip() or "this text", text or "")}

    def save_as(self, text: str | None, name: str, editing: dict[str, str] | None, *given: Any) -> dict[Any, Any]:
        """What is wrong is said under the text, which stays as it is."""
        text, name = text or "", name.strip()
        before = editing or {}
        try:
            if not name:
                raise NotFound("Give it a name to save it under.")
            over = before.get("sha256", "") if name == before.get("name") else ""
            probesets.save(self.panel.home, name, text, over)
        except KatherineError as error:
            return {self.wrong: _problems(str(error))}
        # As it was written: with its name in it.
        kept = probesets.text(self.panel.home, name)
        said = Markup('<p class="k-good">{}</p>').format(f"Saved as {name}.")
        return self._news(name, *given[1:]) | {
            self.text: kept,
            self.wrong: said,
            self.name: name,
            self.editing: {"name": name, "sha256": probesets.sha256(kept)},
        }

    def ask_delete(self, *given: Any) -> dict[Any, Any]:
        said = Markup("<p>Delete the set {}? Runs that asked it keep their own copy.</p>").format(self._known(given[0]))
        return {self.condemned: gr.update(visible=True), self.question: said}

    def keep_it(self) -> dict[Any, Any]:
        return {self.condemned: gr.update(visible=False)}

    def delete_it(self, *given: Any) -> dict[Any, Any]:
        probesets.remove(self.panel.home, self._known(given[0]))
        return self._news(probesets.BUILT_IN, *given[1:]) | self.close_editor() | self.keep_it()

    def _known(self, name: str) -> str:
        """A set's name from the page: no path, which the command line may give."""
        if name not in probesets.names(self.panel.home):
            raise NotFound(f"There is no probe set {name!r} any more.")
        return name

    def _check(self, name: str, text: str) -> Markup:
        try:
            found = probesets.read(text, name)
        except KatherineError as error:
            return _problems(str(error))
        return Markup('<p class="k-dim">{}</p>').format(f"{_counted(found)}. It can be read.")

    def _recipe(self) -> ProbeRecipe:
        made = drafts.load(self.panel.home).recipe("probe")
        assert isinstance(made, ProbeRecipe)
        return made

    # ------------------------------------------------------------------------------------------------ parts

    def _news(
        self,
        name: str | None,
        export: str | None,
        picked: Sequence[str] | None,
        past: str | None,
        chosen: str,
        probe: str,
        marks: dict[str, str] | None,
    ) -> dict[Any, Any]:
        """Component → value, of those that are not what they were."""
        told = Told(marks)
        everyone = self.panel.history.runs()
        asked = self._sets(told, name)
        self._offer(told, export, picked, everyone, asked)
        mine = [seen for seen in everyone if seen.kind == "probe"]
        self._follow(told, mine)
        seen = next((each for each in mine if each.id == chosen), mine[0] if mine else None)
        rows = [self._line(each) for each in mine]
        ids = [each.id for each in mine]
        told.tell(
            "runs",
            self.runs,
            [rows, seen.id if seen else ""],
            lambda: self.runs.rows(rows, ids, selected=seen.id if seen else None),
        )
        told.visible("results", self.results, bool(seen))
        if seen:
            self._describe(told, seen, probe, past, everyone)
        return told.values | {self.marks: told.marks} if told.values else {}

    def _sets(self, told: Told, name: str | None) -> ProbeSet | None:
        """The set that is chosen, None where it cannot be read."""
        home = self.panel.home
        names = probesets.names(home)
        at = name if name in names else probesets.BUILT_IN
        told.tell("set", self.set, [names, at], lambda: gr.update(choices=names, value=at))
        told.visible("delete", self.delete, probesets.is_own(at))
        found: ProbeSet | None = None
        try:
            found = probesets.load(home, at)
            built_in = "" if probesets.is_own(at) else " Built in: save it under another name to change it."
            said = Markup("<p>{} <span class='k-dim'>{}.{}</span></p>").format(
                found.description, _counted(found), built_in
            )
        except KatherineError as error:
            said = _problems(str(error))
        told.say("described", self.described, said)
        rows = [_probe(each) for each in found.probe] if found else []
        told.tell("probes", self.probes, rows, lambda: self.probes.rows(rows))
        return found

    def _offer(
        self,
        told: Told,
        export: str | None,
        picked: Sequence[str] | None,
        everyone: Sequence[Seen],
        asked: ProbeSet | None,
    ) -> None:
        exports = [seen for seen in everyone if seen.kind == "export" and seen.status.state is State.succeeded]
        at = next((seen for seen in exports if seen.id == export), exports[0] if exports else None)
        told.tell(
            "export",
            self.export,
            [[seen.id for seen in exports], at.id if at else None],
            lambda: gr.update(
                choices=[(described.option(self.panel.history, seen), seen.id) for seen in exports],
                value=at.id if at else None,
            ),
        )
        there = columns.everyone(self.panel.home, everyone)
        mine = [column.id for column in there if at and column.export == at.id]
        there.sort(key=lambda column: (column.id not in mine, column.export is not None))
        known = {column.id for column in there}
        first = "columns" not in told.marks
        kept = mine if first else [each for each in picked or () if each in known]
        told.tell(
            "columns",
            self.columns,
            [[column.id for column in there], mine],
            lambda: gr.update(choices=[(_title(column, mine), column.id) for column in there], value=kept),
        )
        told.tell("ask", self.ask, bool(at and asked), lambda: gr.update(interactive=bool(at and asked)))
        told.say("about", self.about, self._about(at, kept, asked))

    def _about(self, at: Seen | None, kept: Sequence[str], asked: ProbeSet | None) -> Markup:
        if at is None:
            return Markup('<p class="k-empty">{}</p>').format(
                "There is no finished export yet. Export a trained run in the Export tab; its files can be asked then."
            )
        if asked is None:
            return Markup('<p class="k-bad">{}</p>').format(
                "The set cannot be asked as it is: see what is wrong below."
            )
        made = self._recipe()
        how = "the likeliest token each time" if made.temperature == 0 else f"temperature {made.temperature:g}"
        said = f"{len(asked.probe)} probes to each of {len(kept)} columns."
        rest = f"Answers of up to {made.max_new_tokens} tokens, {how}, seed {made.seed}: the same for all (Recipe tab)."
        try:
            made_before = columns.base_of(self.panel.home, at.id) is not None
        except KatherineError:
            made_before = True  # the export is damaged, which its own tab says
        base = "" if made_before else " The bare base can be asked once its file was made (Chat tab)."
        return Markup('<p>{} <span class="k-dim">{}{}</span></p>').format(said, rest, base)

    def _follow(self, told: Told, mine: Sequence[Seen]) -> None:
        going = _under_way(mine)
        told.say("progress", self.progress, Markup().join(_progress(seen) for seen in going))
        label = ""
        if going:
            label = "End it now" if going[0].status.state is State.stopping else "Stop"
        told.tell("stop", self.stop, label, lambda: gr.update(value=label or "Stop", visible=bool(label)))

    def _line(self, seen: Seen) -> list[Any]:
        record = seen.run.record
        return [
            tones.short(seen.id),
            str(record.recipe.get("probes", "")),
            tones.short(record.parent or ""),
            described.state(seen),
            described.result(self.panel.history.outcome(seen)),
            Cell(moment(record.created), sort=record.created),
        ]

    def _describe(self, told: Told, seen: Seen, probe: str, past: str | None, everyone: Sequence[Seen]) -> None:
        head = described.head(seen, self.panel.history.outcome(seen))
        card: Scorecard | None = None
        try:
            card = scorecard.read(seen.run)
        except KatherineError as error:
            head += _problems(str(error))
        if card and card.rows:
            head += _kept(card) + described.downloads(seen) + _csv(seen)
        else:
            head += described.downloads(seen)
        told.say("head", self.head, head)
        models = list(card.models) if card else []
        rates = _rates(card) if card else []
        told.tell(
            "rates",
            self.rates,
            [seen.id, models, rates],
            lambda: self.rates.rows(rates) | {"columns": ["Category", *map(scorecard.named, models)]},
        )
        rows = card.worst_first() if card else []
        at = card.row(probe) if card else None
        cells = [_matrix(row, models) for row in rows]
        told.tell(
            "matrix",
            self.matrix,
            [seen.id, models, cells, at.id if at else ""],
            lambda: (
                self.matrix.rows(cells, [row.id for row in rows], selected=at.id if at else None)
                | {"columns": ["Probe", "Category", "Question", *map(scorecard.named, models)]}
            ),
        )
        told.say("answers", self.answers, _answers(at, models))
        found = [_difference(each) for each in card.differences()] if card else []
        told.tell("differences", self.differences, [seen.id, found], lambda: self.differences.rows(found))
        self._compare(told, seen, card, past, everyone)

    def _compare(
        self, told: Told, seen: Seen, card: Scorecard | None, past: str | None, everyone: Sequence[Seen]
    ) -> None:
        others = scorecard.comparable(everyone, card) if card else []
        at = next((each for each in others if each.id == past), None)
        told.tell(
            "past",
            self.past,
            [seen.id, [each.id for each in others], at.id if at else None],
            lambda: gr.update(
                choices=[(described.option(self.panel.history, each), each.id) for each in others],
                value=at.id if at else None,
            ),
        )
        note = Markup()
        found: list[Difference] = []
        if at and card:
            try:
                before = scorecard.read(at.run)
                found = card.against(before)
                if otherwise := card.asked_otherwise(before):
                    note = Markup('<p class="k-warn">{}</p>').format(f"Then asked otherwise: {'; '.join(otherwise)}.")
            except KatherineError as error:
                note = _problems(str(error))
        told.say("past note", self.past_note, note)
        rows = [_since(each) for each in found]
        told.tell("against", self.against, [seen.id, past, rows], lambda: self.against.rows(rows))


# ---------------------------------------------------------------------------------------------------- in words


def _counted(found: ProbeSet) -> str:
    open_ones = sum(not probe.has_rule for probe in found.probe)
    said = f"{len(found.probe)} {'probe' if len(found.probe) == 1 else 'probes'}"
    return f"{said}, {open_ones} for the reviewer" if open_ones else said


def _title(column: Column, mine: Sequence[str]) -> str:
    name = columns.title(column)
    if column.export is not None and column.id not in mine:
        name = f"{name} of {tones.short(column.export)}"
    return f"{name} · {size(column.bytes)}"


def _problems(text: str) -> Markup:
    each = Markup().join(Markup("<li class='k-bad'>{}</li>").format(line) for line in text.split("\n") if line.strip())
    return Markup('<ul class="k-set-wrong">{}</ul>').format(each)


def _short(text: str) -> Cell:
    flat = " ".join(text.split())
    return Cell(
        flat if len(flat) <= QUESTION else f"{flat[: QUESTION - 1]}…", whole=text if len(flat) > QUESTION else ""
    )


def _probe(probe: probesets.Probe) -> list[Any]:
    questions = " → ".join(probe.questions)
    rules = probe.rules() if probe.has_rule else ["no rule: for the reviewer"]
    return [probe.id, probe.category, questions, "; ".join(rules), probe.why]


def _under_way(among: Sequence[Seen]) -> list[Seen]:
    """Probe runs that have not ended: the one that is carried out first, then those that wait, oldest first."""
    going = [seen for seen in reversed(among) if seen.kind == "probe" and seen.status.state not in ENDED]
    return sorted(going, key=lambda seen: seen.status.state is State.queued)


def _progress(seen: Seen) -> Markup:
    """A run that has not ended: where it is, or why it waits."""
    status = seen.status
    name = tones.short(seen.id)
    if status.state is State.queued:
        return Markup('<p class="k-dim">{}: {}</p>').format(name, status.reason or "waits for its turn")
    step = f", {status.step:,} of {status.of:,}" if status.of else ""
    stopping = " · stopping after this question" if status.state is State.stopping else ""
    # Whole tens of seconds: the page is sent only what changed.
    spent = duration(status.seconds // 10 * 10)
    return Markup(
        '<p><span class="k-tone k-busy">{}</span>: {}{}{} <span class="k-dim">{}</span></p>'
        '<progress max="1" value="{:.3f}"></progress>'
    ).format(name, status.phase, step, stopping, spent, status.step / status.of if status.of else 0.0)


def _kept(card: Scorecard) -> Markup:
    if card.asked is None:
        return Markup('<p class="k-dim k-note">{}</p>').format(
            "This run is of before a run kept its set: its answers and what broke a rule are known, the rules are not."
        )
    return Markup('<p class="k-dim k-note">{}</p>').format(
        f"Asked the set {card.set_name} of {card.asked} probes as it was then: probes.toml below."
    )


def _csv(seen: Seen) -> Markup:
    link = Markup('<a href="{}" download>{}</a>').format(files.address(seen.id, files.RESULTS), "Results as CSV")
    return Markup('<div class="k-files">{}</div>').format(link)


def _rates(card: Scorecard) -> list[list[Any]]:
    def cell(model: str, category: str | None) -> Cell:
        rate = card.rate(model, category)
        return Cell(rate.words(), sort=rate.passed / rate.decided if rate.decided else "")

    rows: list[list[Any]] = [["all", *(cell(model, None) for model in card.models)]]
    rows += [[name, *(cell(model, name) for model in card.models)] for name in card.categories]
    waiting = [card.rate(model).undecided for model in card.models]
    if any(waiting):
        rows.append(
            ["for the reviewer", *(Cell(str(count), sort=count, tone="warn" if count else "") for count in waiting)]
        )
    return rows


def _matrix(row: Row, models: Sequence[str]) -> list[Any]:
    cells = []
    for model in models:
        said = scorecard.verdict(row.answers.get(model))
        reasons = "; ".join(row.answers[model].score.reasons) if model in row.answers else ""
        cells.append(Cell(said, sort=_ORDER.get(said, ""), tone=_TONES.get(said, ""), whole=reasons))
    return [row.id, row.category, _short(row.question), *cells]


def _answers(row: Row | None, models: Sequence[str]) -> Markup:
    if row is None:
        return Markup()
    why = row.probe.why if row.probe else ""
    rules = scorecard.rules_of(row)
    head = Markup("<h4>{} <span class='k-dim'>{}</span></h4>").format(row.id, row.category)
    if why:
        head += Markup("<p>{}</p>").format(why)
    if rules:
        head += Markup("<p class='k-dim'>Asked of each answer: {}.</p>").format("; ".join(rules))
    if row.probe and not row.probe.has_rule:
        head += Markup("<p class='k-warn'>No rule of its own decides: it is for the reviewer.</p>")
    said = Markup().join(
        _answer(scorecard.named(model), row.answers[model]) for model in models if model in row.answers
    )
    return Markup("<section class='k-answers-of'>{}<div class='k-cards'>{}</div></section>").format(head, said)


def _answer(name: str, answer: Answer) -> Markup:
    verdict = scorecard.verdict(answer)
    reasons = [*answer.score.reasons] or [*answer.score.held]
    decided = Markup().join(Markup("<li>{}</li>").format(reason) for reason in reasons)
    decided = Markup("<ul class='k-decided'>{}</ul>").format(decided) if decided else decided
    talk = Markup().join(
        Markup("<p class='k-turn-{}'>{}</p>").format(message.role, message.content) for message in answer.talk
    )
    reply = answer.reply
    length = ""
    if reply:
        length = f"{reply.tokens} tokens, {'ended by itself' if reply.ended else 'cut at the limit'}"
    return Markup(
        "<article class='k-card'><header><b>{}</b> <span class='k-tone k-{}'>{}</span></header>{}"
        "{}<p class='k-dim'>{}</p></article>"
    ).format(name, _TONES[verdict], verdict, talk, decided, length)


def _those(ids: Sequence[str]) -> Cell:
    return Cell(f"{len(ids)}: {', '.join(ids)}" if ids else "none", sort=float(len(ids)))


def _difference(each: Difference) -> list[Any]:
    return [
        f"{scorecard.named(each.first)} and {scorecard.named(each.second)}",
        Cell(str(each.both), sort=each.both),
        _those(each.only_first),
        _those(each.only_second),
        each.words(),
    ]


def _since(each: Difference) -> list[Any]:
    words = each.words()
    if each.rules_changed:
        words += f"; the rules of {', '.join(each.rules_changed)} are others now"
    return [
        scorecard.named(each.second),
        Cell(str(each.both), sort=each.both),
        Cell(str(each.passed_first), sort=each.passed_first),
        Cell(str(each.passed_second), sort=each.passed_second),
        _those(each.only_first),
        _those(each.only_second),
        words,
    ]


def build(panel: Panel) -> Live:
    page = _Page(panel)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    page.set.input(shown(page.refresh), page.inputs, page.outputs, **quiet)
    page.export.input(shown(page.of_export), page.inputs, page.outputs, **quiet)
    page.columns.input(shown(page.refresh), page.inputs, page.outputs, **quiet)
    page.past.input(shown(page.refresh), page.inputs, page.outputs, **quiet)
    page.ask.click(shown(page.begin), [page.stages, *page.inputs], page.outputs, **quiet)
    page.stop.click(shown(page.end), page.inputs, page.outputs, **quiet)
    page.edit.click(shown(page.open_editor), page.inputs, page.editing_outputs, **quiet)
    page.close.click(shown(page.close_editor), [], page.editing_outputs, **quiet)
    page.check.click(shown(page.look_over), [page.text, page.name], page.editing_outputs, **quiet)
    page.save.click(
        shown(page.save_as), [page.text, page.name, page.editing, *page.inputs], page.editing_outputs, **quiet
    )
    page.delete.click(shown(page.ask_delete), page.inputs, page.editing_outputs, **quiet)
    page.keep.click(shown(page.keep_it), [], page.editing_outputs, **quiet)
    page.delete_now.click(shown(page.delete_it), page.inputs, page.editing_outputs, **quiet)
    page.runs.select(shown(page.choose_run), page.inputs, page.outputs, **quiet)
    page.matrix.select(shown(page.choose_probe), page.inputs, page.outputs, **quiet)
    return Live(page.refresh, page.outputs, page.inputs, every=2.0)
