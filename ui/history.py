"""The history tab: all runs in one table, one run's page, any two runs compared. Reading and comparing runs is
katherine's business."""

from collections.abc import Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from katherine import comparison, lineage, outcomes, prediction
from katherine import hardware as machines
from katherine.history import Seen
from katherine.outcomes import Outcome
from katherine.recipe import KINDS
from katherine.runs import State
from katherine.units import moment, size
from ui import lineage as drawings
from ui import plots, runs, tones
from ui.edge import shown
from ui.figure import Figure
from ui.held import held
from ui.panel import Live, Panel
from ui.table import Cell, Table
from ui.told import Told

TITLE = "History"
ANY = "any"
# What is drawn of a run here, of all that was logged: speed and memory are for watching it.
CURVES = ("loss", "margin", "accuracy", "rewards", "learning_rate", "grad_norm")
COLUMNS = ("Run", "Kind", "State", "Result", "Dataset", "Built on", "Steps#", "Took#", "Cost#", "Asked for", "Who")


class _Page:
    """The tab's components and what they show. It keeps nothing of a visitor: which run is chosen, and what was sent
    last, comes with each call."""

    def __init__(self, panel: Panel):
        self.panel = panel
        self.curves = panel.curves
        with gr.Row():
            self.kind = gr.Dropdown([ANY, *KINDS], value=ANY, label="Kind", min_width=110, scale=1)
            self.state = gr.Dropdown([ANY, *State], value=ANY, label="State", min_width=130, scale=1)
            self.text = gr.Textbox("", label="Search", placeholder="id, dataset, base, who …", min_width=180, scale=3)
        self.count = gr.HTML("", elem_classes="k-dim")
        self.table = Table(
            COLUMNS, "No run yet. Start one in the Train tab.", selects=True, elem_classes=["k-all-runs", "k-chooses"]
        )
        self.chosen = held("")
        self.other = held("")
        # What each component was last sent, by a short hash: so that only what changed is sent again.
        self.marks = held({})
        with gr.Column(visible=False) as self.page:
            self.head = gr.HTML("")
            self.files = gr.HTML("")
            self.drawing = drawings.Drawing()
            self.pick = gr.Dropdown(
                [], value=None, label="Compare with", allow_custom_value=True, min_width=240, elem_id="compare"
            )
            with gr.Column(visible=False) as self.compared:
                self.said = gr.HTML("")
                self.differences = Table(
                    ("What differs", "This run", "The other"), "Nothing that was asked differs.", elem_classes="k-pair"
                )
                self.results = Table(
                    ("Result", "This run", "The other", "Difference#"),
                    "Neither has a result yet.",
                    elem_classes="k-pair",
                )
            with gr.Row(elem_classes="k-curves"):
                self.figures = [Figure("", height=240, min_width=340, scale=1, visible=False) for _ in CURVES]
            self.recipe_title = gr.HTML("", elem_classes="k-section")
            self.recipe = Table(
                ("Setting", "Value", "Preset", "Why the preset has it"),
                "This kind has no recipe.",
                elem_classes="k-frozen",
            )
            gr.HTML("Expected when it began, and what came", elem_classes="k-section")
            self.expected = Table(("What", "Expected", "Came"), "Nothing was expected of it, and nothing came yet.")
            gr.HTML("Result, machine and versions", elem_classes="k-section")
            self.facts = Table(("Fact", "Value"), "Nothing is recorded.")

    @property
    def inputs(self) -> list[Any]:
        return [self.kind, self.state, self.text, self.chosen, self.other, self.marks]

    @property
    def outputs(self) -> list[Any]:
        return [
            self.count, self.table, self.page, self.head, self.files, self.drawing, self.pick, self.compared, self.said,
            self.differences, self.results, *self.figures, self.recipe_title, self.recipe, self.expected, self.facts,
            self.chosen, self.other, self.marks,
        ]  # fmt: skip

    # ------------------------------------------------------------------------------------------------ handlers

    def refresh(self, kind: str, state: str, text: str, chosen: str, other: str, marks: dict[str, str]) -> Any:
        return self._news(kind, state, text, chosen, other, marks) or gr.skip()

    def choose(
        self, kind: str, state: str, text: str, chosen: str, other: str, marks: dict[str, str], event: gr.EventData
    ) -> Any:
        """A row of the table, or a box of the drawing."""
        run_id = self.panel.history.get(str(event.id)).id
        other = "" if run_id == other else other
        return self._news(kind, state, text, run_id, other, marks) | {self.chosen: run_id, self.other: other}

    def pick_other(
        self, kind: str, state: str, text: str, chosen: str, other: str, marks: dict[str, str], picked: str | None
    ) -> Any:
        run_id = self.panel.history.get(picked).id if picked else ""
        return self._news(kind, state, text, chosen, run_id, marks) | {self.other: run_id}

    # ------------------------------------------------------------------------------------------------ parts

    def _news(
        self, kind: str, state: str, text: str, chosen: str, other: str, marks: dict[str, str] | None
    ) -> dict[Any, Any]:
        """Component → value, of those that are not what they were."""
        told = Told(marks)
        everyone = self.panel.history.runs()
        self._list(told, everyone, kind, state, text, chosen)
        by_id = {seen.id: seen for seen in everyone}
        seen, against = by_id.get(chosen), by_id.get(other)
        told.visible("page", self.page, bool(seen))
        if seen:
            self._describe(told, seen, everyone)
            self._offer(told, seen, against, everyone)
            self._compare(told, seen, against, everyone)
            self._draw(told, seen, against)
        return told.values | {self.marks: told.marks} if told.values else {}

    def _list(self, told: Told, everyone: Sequence[Seen], kind: str, state: str, text: str, chosen: str) -> None:
        listed = [seen for seen in everyone if _matches(seen, kind, state, text)]
        told.tell(
            "table",
            self.table,
            [_digest(listed), chosen],
            lambda: self.table.rows(
                [self._row(seen) for seen in listed], [seen.id for seen in listed], selected=chosen or None
            ),
        )
        count = (
            f"{len(everyone):,} runs" if len(listed) == len(everyone) else f"{len(listed):,} of {len(everyone):,} runs"
        )
        told.tell("count", self.count, count, lambda: Markup("{}").format(count if everyone else ""))

    def _row(self, seen: Seen) -> list[Any]:
        record = seen.run.record
        outcome = self.panel.history.outcome(seen)
        steps = outcome.steps if outcome.steps is not None else ""
        return [
            tones.short(seen.id),
            seen.kind,
            runs.state(seen),
            runs.result(outcome),
            record.dataset or "",
            tones.short(record.parent) if record.parent else "",
            Cell(f"{steps:,}", sort=steps) if steps != "" else "",
            runs.took(seen),
            runs.cost(seen, outcome),
            Cell(moment(record.created), sort=record.created),
            record.who,
        ]

    def _describe(self, told: Told, seen: Seen, everyone: Sequence[Seen]) -> None:
        run, record = seen.run, seen.run.record
        outcome = self.panel.history.outcome(seen)
        told.say("head", self.head, runs.head(seen, outcome))
        told.say("files", self.files, runs.downloads(seen))
        told.say(
            "lineage",
            self.drawing,
            drawings.draw(lineage.trace(self.panel.home, self.panel.history, seen.id, everyone)),
        )

        preset, values = comparison.nearest_preset(self.panel.home, record)
        reasons = _reasons(record.kind)
        pairs = [(name, value, values.get(name)) for name, value in record.recipe.items()]
        pairs.sort(key=lambda pair: pair[1] == pair[2])
        apart = sum(mine != theirs for _, mine, theirs in pairs)
        title = f"Recipe, frozen when it was asked for: {apart or 'nothing'} differs from the preset {preset}"
        told.say("recipe title", self.recipe_title, Markup("{}").format(title if preset else "Recipe"))
        rows = [
            [
                name,
                Cell(comparison.text(mine), tone="" if mine == theirs else "warn"),
                comparison.text(theirs) if preset else "",
                reasons.get(name, ""),
            ]
            for name, mine, theirs in pairs
        ]
        told.tell("recipe", self.recipe, rows, lambda: self.recipe.rows(rows))
        told.tell("expected", self.expected, _digest([seen]), lambda: self.expected.rows(self._expected(seen, outcome)))
        facts = [[_said(name), comparison.text(value)] for name, value in self._facts(seen)]
        told.tell("facts", self.facts, [run.id, facts], lambda: self.facts.rows(facts))

    def _expected(self, seen: Seen, outcome: Outcome) -> list[list[str]]:
        if seen.damage or outcome.damage:
            return []
        return [[line.what, line.predicted, line.actual] for line in prediction.compared(seen.run)]

    def _facts(self, seen: Seen) -> list[tuple[str, Any]]:
        record = seen.run.record
        machine = machines.of_run(seen.run)
        facts: list[tuple[str, Any]] = list(outcomes.figures(seen.run, seen.status).items())
        if machine:
            facts += [
                ("GPU", machine.gpu or "none"),
                ("cores", machine.cores),
                ("memory", size(machine.memory)),
            ]
        facts += [(f"{name}, fingerprint", value) for name, value in record.inputs.items()]
        facts.append(("git revision", record.revision or "unknown"))
        return facts + [(f"version of {name}", value) for name, value in record.versions.items()]

    def _offer(self, told: Told, seen: Seen, against: Seen | None, everyone: Sequence[Seen]) -> None:
        """Those of the same kind first: they are what one compares with."""
        others = sorted((each for each in everyone if each is not seen), key=lambda each: each.kind != seen.kind)
        told.tell(
            "pick",
            self.pick,
            [_digest(others), seen.id],
            lambda: gr.update(
                choices=[(runs.option(self.panel.history, each), each.id) for each in others],
                value=against.id if against else None,
            ),
        )

    def _compare(self, told: Told, seen: Seen, against: Seen | None, everyone: Sequence[Seen]) -> None:
        told.visible("compared", self.compared, bool(against))
        if not against:
            return
        found = comparison.compare(self.panel.history, seen.id, against.id, everyone)
        said = Markup("<b>{}</b> beside <b>{}</b>: {} of the recipes' values are the same.").format(
            tones.short(seen.id), tones.short(against.id), f"{found.equal:,}"
        )
        told.say("said", self.said, said)
        apart = [[pair.name, comparison.text(pair.a), comparison.text(pair.b)] for pair in found.asked]
        apart += [[f"version of {p.name}", comparison.text(p.a), comparison.text(p.b)] for p in found.versions]
        told.tell("differences", self.differences, apart, lambda: self.differences.rows(apart))
        results = [
            [
                _said(pair.name),
                _short(comparison.text(pair.a)),
                _short(comparison.text(pair.b)),
                _difference(pair.a, pair.b),
            ]
            for pair in found.results
        ]
        told.tell("results", self.results, results, lambda: self.results.rows(results))

    def _draw(self, told: Told, seen: Seen, against: Seen | None) -> None:
        drawn = [
            plots.Shown(each.id, tones.short(each.id), self.curves.read(each.run.path / "metrics.jsonl"))
            for each in (seen, against)
            if each
        ]
        mark = plots.mark(seen.kind, drawn[0], drawn[1:], 0.0)
        if told.is_news("figures", mark):
            figures = plots.draw(seen.kind, drawn[0], drawn[1:])
            for component, name in zip(self.figures, CURVES, strict=True):
                value = _named(figures.get(name), drawn)
                told.values[component] = gr.update(value=value, visible=value is not None)


def _named(figure: dict[str, Any] | None, drawn: Sequence[plots.Shown]) -> dict[str, Any] | None:
    """Two runs in one figure: the first goes by its own name too, and the legend leaves the title its place."""
    if figure is None or len(drawn) < 2:
        return figure
    own = [trace for trace in figure["data"] if str(trace["uid"]).startswith(drawn[0].id)]
    names = [drawn[0].label if len(own) == 1 else f"{drawn[0].label}: {trace['name']}" for trace in own]
    for trace, name in zip(own, names, strict=True):
        trace["name"] = name
    figure["layout"]["legend"] = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom"}
    return figure


def _digest(listed: Sequence[Seen]) -> list[Any]:
    """Changes whenever a row of the table would: what is not in a status was frozen before it."""
    return [
        [seen.id, seen.status.state, seen.status.step, seen.status.of, seen.status.attempt, runs.took(seen).sort]
        for seen in listed
    ]


def _matches(seen: Seen, kind: str, state: str, text: str | None) -> bool:
    if kind not in (ANY, seen.kind) or state not in (ANY, seen.status.state):
        return False
    record = seen.run.record
    whole = " ".join(
        (seen.id, record.dataset or "", record.parent or "", record.who, str(record.recipe.get("base", "")))
    ).casefold()
    return all(word in whole for word in (text or "").casefold().split())


def _reasons(kind: str) -> dict[str, str]:
    return {name: field.description or "" for name, field in KINDS[kind].model_fields.items()} if kind in KINDS else {}


def _said(name: str) -> str:
    """A figure's name in words. What stands before a colon is the name of a file's type or of a model, and stays."""
    whose, colon, what = name.rpartition(": ")
    return whose + colon + what.replace("_", " ")


def _short(text: str) -> Cell:
    """Beside each other, two checksums need no more of them than tells them apart."""
    return Cell(f"{text[:12]}…", whole=text) if len(text) == 64 and " " not in text else Cell(text)


def _difference(a: Any, b: Any) -> Cell:
    if any(isinstance(each, bool) or not isinstance(each, int | float) for each in (a, b)):
        return Cell("" if a == b else "differs", tone="" if a == b else "warn", sort="")
    return Cell("" if a == b else f"{b - a:+,.6g}", sort=b - a)


def build(panel: Panel) -> Live:
    page = _Page(panel)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    for event in (page.kind.change, page.state.change, page.text.change):
        event(shown(page.refresh), page.inputs, page.outputs, **quiet)
    page.table.select(shown(page.choose), page.inputs, page.outputs, **quiet)
    page.drawing.select(shown(page.choose), page.inputs, page.outputs, **quiet)
    page.pick.input(shown(page.pick_other), [*page.inputs, page.pick], page.outputs, **quiet)
    return Live(page.refresh, page.outputs, page.inputs, every=5.0)
