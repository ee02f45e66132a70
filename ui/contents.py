"""The lower part of the dataset tab: one dataset, what is in it, what is wrong with it, and what can be done with it.
Reading it is shelf's; the work is jobs.errands'."""

from typing import Any

import gradio as gr
from markupsafe import Markup

from jobs import errands
from katherine import drafts, recipe, shelf
from katherine.errors import DataError, KatherineError, NotFound
from katherine.lines import Problem
from katherine.runs import ENDED, State
from katherine.shelf import Summary
from katherine.units import moment
from ui import files, lengths
from ui.edge import shown
from ui.examples import Examples
from ui.figure import Figure
from ui.held import held
from ui.inbox import offered, prepare
from ui.panel import Panel
from ui.table import Cell, Table

# Problems that are added to the list at a time: what a person scrolls through before asking for more.
PROBLEMS = 100
# Pairs to choose among one by one. More would be chosen by file, or by hash on the command line.
MOST_PAIRS = 300
# Characters of each text of such a pair: the three of them fit into two lines.
SHOWN_TEXT = 90
_NONE, _ALL, _SOME = "none", "all", "chosen below"


class Contents:
    """The components, and what they do. memory: the browser's own: `dataset` in it is the one that is shown."""

    def __init__(self, panel: Panel, memory: gr.BrowserState):
        self.panel = panel
        self.home = panel.home
        self.memory = memory
        self.problem = held({})
        self.comparing = held("")
        with gr.Column(visible=False) as self.whole:
            with gr.Row(elem_classes="kd-heading"):
                self.title = gr.HTML(elem_classes="kd-title", min_width=240)
                self.use = gr.Button("Use this dataset", variant="primary", min_width=180, scale=0)
                self.delete = gr.Button("Delete…", min_width=90, scale=0)
                self.sure = gr.Button("Delete for good", variant="stop", min_width=130, scale=0, visible=False)
                self.keep = gr.Button("Keep it", min_width=80, scale=0, visible=False)
            with gr.Tabs():
                with gr.Tab("Counts"):
                    self.kinds = Table(
                        ["", "In use#", "Found#", "Duplicates#", "Rejected#", "Left out#"], "", elem_classes="kd-wide"
                    )
                    self.by_file = Table(
                        ["File", "Lines#", "SFT#", "Pairs#", "Duplicates#", "Rejected#", ""],
                        "No files.",
                        elem_classes="kd-wide",
                    )
                with gr.Tab("Problems"):
                    self.links = gr.HTML(elem_classes="kd-note")
                    self.groups = Table(
                        ["Problem", "", "Lines#", "Files#"], "No problems: every line is in use.", selects=True
                    )
                    self.opened = gr.HTML(elem_classes="kd-note")
                    self.problems = Table(
                        ["File", "Line#", "Reason", "Text"],
                        "Choose a problem above to see its lines.",
                        elem_classes="kd-wide",
                    )
                    self.more = gr.Button("More", size="sm", visible=False)
                with gr.Tab("Lengths"):
                    self.sft_words = gr.HTML(elem_classes="kd-note")
                    self.sft_lengths = Figure("No conversations were counted.", height=260)
                    self.pair_words = gr.HTML(elem_classes="kd-note")
                    self.pair_lengths = Figure("No pairs were counted.", height=260)
                    self.bias = gr.HTML(elem_classes="kd-note")
                with gr.Tab("Examples"):
                    self.examples = Examples(panel, memory)
                with gr.Tab("Change what goes in"):
                    gr.HTML(
                        "<p class='k-dim kd-note'>A dataset never changes: another choice of its files and pairs makes "
                        "another dataset.</p>"
                    )
                    self.files = offered(
                        gr.CheckboxGroup(label="Files that go in", choices=[], elem_classes="kd-files")
                    )
                    self.uncurated = offered(
                        gr.Radio(label="Pairs without _cat and _type", choices=[_NONE, _ALL, _SOME], value=_NONE)
                    )
                    self.pairs = offered(
                        gr.CheckboxGroup(label="Pairs", choices=[], elem_classes="kd-files", visible=False)
                    )
                    self.pairs_note = gr.HTML(elem_classes="kd-note")
                    with gr.Row(equal_height=True):
                        self.name = gr.Textbox(
                            label="Name of the new dataset", max_lines=1, max_length=64, min_width=160
                        )
                        self.max_length = gr.Number(label="Max length, tokens", precision=0, minimum=1, min_width=120)
                        self.change = gr.Button(
                            "Prepare another dataset", variant="primary", min_width=180, elem_classes="kd-go"
                        )
                with gr.Tab("Compare"):
                    self.other = offered(gr.Dropdown(label="Compare with", choices=[], min_width=220))
                    self.compared = Table(["Examples", "Only in this#", "In both#", "Only in the other#"], "")
                    self.differs = gr.HTML(elem_classes="kd-note")
        self._wire()

    @property
    def outputs(self) -> list[Any]:
        """Everything that shows one dataset."""
        return [
            self.whole, self.title, self.use, self.delete, self.sure, self.keep, self.kinds, self.by_file, self.links,
            self.groups, self.opened, self.problems, self.more, self.problem, self.sft_words, self.sft_lengths,
            self.pair_words, self.pair_lengths, self.bias, self.files, self.uncurated, self.pairs, self.pairs_note,
            self.name, self.max_length, self.other, self.compared, self.differs, self.comparing,
            *self.examples.outputs,
        ]  # fmt: skip

    def _wire(self) -> None:
        given: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        memory, opened = self.memory, [self.opened, self.problems, self.more, self.problem]
        self.use.click(shown(self.use_it), [memory], [self.title, self.use], **given)
        asking = [self.delete, self.sure, self.keep]
        self.delete.click(shown(self.ask), [memory], asking, **given)
        self.keep.click(shown(lambda: self._asking(False)), None, asking, **given)
        self.groups.select(shown(self.open_group), [memory], opened, **given)
        self.more.click(
            shown(self.more_problems), [memory, self.problem], [self.more, self.problems, self.problem], **given
        )
        self.uncurated.change(
            shown(lambda which: gr.CheckboxGroup(visible=which == _SOME)), [self.uncurated], [self.pairs], **given
        )
        asked = [memory, self.files, self.uncurated, self.pairs, self.name, self.max_length]
        self.change.click(shown(self.change_it), asked, [memory], **given)
        compared = [self.compared, self.differs, self.comparing]
        self.other.input(shown(self.compare), [memory, self.other], compared, **given)

    # ------------------------------------------------------------------------------------------ all of it

    def show(self, dataset_id: str | None) -> dict[Any, Any]:
        """The values of all `outputs` for a dataset, or for none."""
        try:
            if dataset_id is None:
                return {self.whole: gr.Column(visible=False)}
            summary = shelf.summary(self.home, dataset_id)
        except NotFound:
            return {self.whole: gr.Column(visible=False)}
        return (
            {self.whole: gr.Column(visible=True)}
            | self.heading(summary)
            | self._asking(False)
            | self._counts(summary)
            | self._problem_groups(summary)
            | self._lengths(summary)
            | self._choices(summary)
            | self._others(summary)
            | self.examples.page(
                summary.id,
                {"kind": "sft" if summary.report["sft"]["unique"] else "dpo", "search": "", "cursors": [_BEGINNING]},
            )
        )

    def refresh(self, dataset_id: str | None, place: dict[str, Any], comparing: str) -> dict[Any, Any]:
        """What has come since: a tokenizer, and the end of a comparison."""
        if dataset_id is None:
            return {}
        return self.examples.refresh(dataset_id, place) | (self._comparison(comparing) if comparing else {})

    def heading(self, summary: Summary) -> dict[Any, Any]:
        used = drafts.load(self.home).dataset == summary.id
        note = Markup("<span class='k-tone k-good'>used for the next run</span>") if used else ""
        title = Markup("<h3>{}</h3> &nbsp;<span class='k-dim'>{} · {}</span> {}").format(
            summary.id, moment(summary.created), summary.fingerprint[:12], note
        )
        return {self.title: title, self.use: gr.Button(interactive=not used)}

    def use_it(self, memory: dict[str, Any] | None) -> dict[Any, Any]:
        summary = shelf.summary(self.home, _chosen(memory))
        drafts.change(self.home, dataset=summary.id)
        return self.heading(summary)

    # ------------------------------------------------------------------------------------------ counts

    def _counts(self, summary: Summary) -> dict[Any, Any]:
        report = summary.report
        sft, dpo = report["sft"], report["dpo"]
        found = dpo["curated"] + dpo["uncurated"]
        rows = [
            ["Conversations (SFT)", sft["unique"], sft["unique"], sft["duplicates"], _bad(sft["rejected"]), 0],
            ["Pairs (DPO)", dpo["used"], found, dpo["duplicates"], _bad(dpo["rejected"]), found - dpo["used"]],
            [Cell("of them curated", tone="dim"), dpo["curated"], dpo["curated"], "", "", ""],
            [Cell("of them uncurated", tone="dim"), dpo["used"] - dpo["curated"], dpo["uncurated"], "", "",
             dpo["uncurated"] - (dpo["used"] - dpo["curated"])],
            ["Neither", "", "", "", _bad(report["unrecognised"]), ""],
            [f"In all: {report['files']:,} files, {report['lines']:,} lines", sft["unique"] + dpo["used"],
             sft["unique"] + found, sft["duplicates"] + dpo["duplicates"],
             _bad(sft["rejected"] + dpo["rejected"] + report["unrecognised"]), found - dpo["used"]],
        ]  # fmt: skip
        by_file = [
            [file["file"], file["lines"], file["sft"], file["dpo"], file["duplicates"], _bad(file["rejected"]),
             Cell("left out", tone="dim") if file.get("left_out") else ""]
            for file in report["by_file"]
        ]  # fmt: skip
        return {self.kinds: self.kinds.rows(rows), self.by_file: self.by_file.rows(by_file)}

    # ------------------------------------------------------------------------------------------ problems

    def _problem_groups(self, summary: Summary) -> dict[Any, Any]:
        groups = summary.report["problem_groups"]
        rows = [
            [group["group"], Cell(group["severity"], tone="bad" if group["severity"] == "rejected" else "warn"),
             group["count"], group["files"]]
            for group in groups
        ]  # fmt: skip
        names = {
            "problems.csv": "all as CSV",
            "problems.jsonl": "all as JSONL",
            "rejects.jsonl": "rejected lines, whole",
        }
        there = [name for name in names if name.endswith(".csv") or (summary.path / name).is_file()]
        links = Markup(" · ").join(
            Markup("<a href='{}' download>{}</a>").format(files.dataset_address(summary.id, name), names[name])
            for name in there
        )
        return {
            self.groups: self.groups.rows(rows, ids=[str(number) for number in range(len(rows))]),
            self.links: Markup("<p>Download: {}</p>").format(links) if groups else "",
            self.opened: "",
            self.problems: self.problems.rows([]),
            self.more: gr.Button(visible=False),
            self.problem: {},
        }

    def open_group(self, memory: dict[str, Any] | None, event: gr.EventData) -> dict[Any, Any]:
        dataset_id, group = _chosen(memory), int(event.id)
        page = shelf.problems(self.home, dataset_id, group, 0, PROBLEMS)
        about = shelf.summary(self.home, dataset_id).report["problem_groups"][group]
        return {
            self.opened: Markup("<p><b>{}</b>: {:,}</p>").format(about["group"], about["count"]),
            self.problems: self.problems.rows(_rows(page.problems)),
            self.more: gr.Button(visible=page.next is not None),
            self.problem: {"group": group, "start": 0, "next": page.next},
        }

    def more_problems(self, memory: dict[str, Any] | None, problem: dict[str, Any]) -> dict[Any, Any]:
        """The following ones in place of those that are shown: a list of a million would not fit a page."""
        if not problem or problem.get("next") is None:
            return {self.more: gr.Button(visible=False)}
        page = shelf.problems(self.home, _chosen(memory), problem["group"], problem["next"], PROBLEMS)
        return {
            self.problems: self.problems.rows(_rows(page.problems)),
            self.more: gr.Button(visible=page.next is not None),
            self.problem: problem | {"next": page.next},
        }

    # ------------------------------------------------------------------------------------------ lengths

    def _lengths(self, summary: Summary) -> dict[Any, Any]:
        said, tone = lengths.bias(summary)
        return {
            self.sft_words: Markup("<p><b>Conversations.</b> {}</p>").format(lengths.words(summary, "sft")),
            self.sft_lengths: lengths.figure(summary, "sft"),
            self.pair_words: Markup("<p><b>Pairs</b>, prompt with the longer reply. {}</p>").format(
                lengths.words(summary, "pairs")
            ),
            self.pair_lengths: lengths.figure(summary, "pairs"),
            self.bias: Markup("<p class='k-tone k-{}'>{}</p>").format(tone, said),
        }

    # ------------------------------------------------------------------------------------------ what goes in

    def _choices(self, summary: Summary) -> dict[Any, Any]:
        report = summary.report
        labels = [
            (f"{file['file']} · {file['sft']:,} SFT, {file['dpo']:,} pairs", file["file"]) for file in report["by_file"]
        ]
        into = [file["file"] for file in report["by_file"] if not file.get("left_out")]
        pairs = shelf.uncurated(self.home, summary.id, MOST_PAIRS)
        used = report["options"]["include_uncurated"]
        which = _SOME if isinstance(used, list) else _ALL if used else _NONE
        note = ""
        if pairs is None and report["dpo"]["uncurated"]:
            note = "This dataset was made before pairs could be chosen one by one: take all or none."
        elif pairs is not None and report["dpo"]["uncurated"] > len(pairs):
            note = (
                f"The first {len(pairs)} of {report['dpo']['uncurated']:,} are listed. Choose among the others by "
                "file, or by hash: app.py prepare --again … --pairs …"
            )
        choices = [_NONE, _ALL] + ([_SOME] if pairs else [])
        return {
            self.files: gr.CheckboxGroup(choices=labels, value=into),
            self.uncurated: gr.Radio(choices=choices, value=which, visible=bool(report["dpo"]["uncurated"])),
            self.pairs: gr.CheckboxGroup(
                choices=[(_pair_label(pair), pair.id) for pair in pairs or []],
                value=[pair.id for pair in pairs or [] if pair.used],
                visible=which == _SOME,
            ),
            self.pairs_note: Markup("<p class='k-dim'>{}</p>").format(note),
            self.name: summary.id.rpartition("-" + summary.fingerprint[:8])[0] or summary.id[:64],
            self.max_length: report["options"]["max_length"],
        }

    def change_it(
        self,
        memory: dict[str, Any] | None,
        into: list[str],
        which: str,
        pairs: list[str],
        name: str,
        max_length: float | None,
    ) -> dict[Any, Any]:
        summary = shelf.summary(self.home, _chosen(memory))
        if not into:
            raise DataError("Every file is left out. Leave one in.")
        request = {
            "dataset": summary.id,
            "leave_out": [file["file"] for file in summary.report["by_file"] if file["file"] not in set(into)],
            "include_uncurated": sorted(pairs) if which == _SOME else which == _ALL,
            "name": (name or "").strip() or None,
        }
        default = recipe.SftRecipe.model_fields["base"].default
        errand = prepare(self.home, request, summary.base or default, max_length)
        return {self.memory: (memory or {}) | {"waiting": errand.id}}

    # ------------------------------------------------------------------------------------------ compare, delete

    def _others(self, summary: Summary) -> dict[Any, Any]:
        others = [other.id for other in shelf.everyone(self.home) if other.id != summary.id]
        return {
            self.other: gr.Dropdown(choices=others, value=None, interactive=bool(others)),
            self.compared: self.compared.rows([]),
            self.differs: "" if others else Markup("<p class='k-empty'>There is no other dataset yet.</p>"),
            self.comparing: "",
        }

    def compare(self, memory: dict[str, Any] | None, other: str | None) -> dict[Any, Any]:
        if not other:
            return {self.comparing: ""}
        request = {"first": _chosen(memory), "second": other}
        # Datasets do not change: what was compared once is true for ever.
        for errand in errands.everyone(self.home):
            if (errand.kind, errand.request) == ("compare", request) and errand.status().state is State.succeeded:
                return self._comparison(errand.id)
        errand = errands.start(self.home, "compare", request, "panel")
        return {
            self.compared: self.compared.rows([]),
            self.differs: Markup("<p class='k-tone k-busy'>Comparing…</p>"),
            self.comparing: errand.id,
        }

    def _comparison(self, errand_id: str) -> dict[Any, Any]:
        try:
            errand = errands.load(self.home, errand_id)
            status = errand.status()
            if status.state not in ENDED:
                return {}
            if status.state is not State.succeeded:
                return self._not_compared(status.reason)
            found = errand.result()
        except KatherineError as error:
            return self._not_compared(str(error))
        rows = [
            [name, found[kind]["only_first"], found[kind]["both"], found[kind]["only_second"]]
            for name, kind in (("Conversations", "sft"), ("Pairs", "dpo"))
        ]
        options = Markup("").join(
            Markup("<li>{}: {} here, {} there</li>").format(name, _brief(here), _brief(there))
            for name, (here, there) in found["options"].items()
        )
        said = Markup("<p>Options that differ:</p><ul>{}</ul>").format(options) if options else "Same options."
        return {self.compared: self.compared.rows(rows), self.differs: said, self.comparing: ""}

    def _not_compared(self, why: str) -> dict[Any, Any]:
        return {self.differs: Markup("<p class='k-tone k-bad'>{}</p>").format(why), self.comparing: ""}

    def ask(self, memory: dict[str, Any] | None) -> dict[Any, Any]:
        shelf.refuse_removal(self.home, _chosen(memory))
        return self._asking(True)

    def _asking(self, asking: bool) -> dict[Any, Any]:
        return {
            self.delete: gr.Button(visible=not asking),
            self.sure: gr.Button(visible=asking),
            self.keep: gr.Button(visible=asking),
        }


_BEGINNING = {"offset": 0, "index": 0}


def _chosen(memory: dict[str, Any] | None) -> str:
    if not memory or not memory.get("dataset"):
        raise DataError("No dataset is chosen. Choose one in the list.")
    return memory["dataset"]


def _bad(count: int) -> Any:
    return Cell(f"{count:,}", sort=count, tone="bad") if count else 0


def _rows(problems: list[Problem]) -> list[list[Any]]:
    return [
        [
            problem.file or "the whole dataset",
            "" if problem.line is None else problem.line,
            problem.reason,
            problem.text,
        ]
        for problem in problems
    ]


def _pair_label(pair: shelf.UncuratedPair) -> str:
    asked, chosen, rejected = (
        text if len(text) <= SHOWN_TEXT else text[: SHOWN_TEXT - 1] + "…"
        for text in (pair.prompt, pair.chosen, pair.rejected)
    )
    return f"{asked} — chosen: {chosen} — rejected: {rejected} ({pair.file}, line {pair.line})"


def _brief(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return f"{len(value)} ({', '.join(map(str, value[:3]))}{', …' if len(value) > 3 else ''})" if value else "none"
    return f"{value:,}" if isinstance(value, int) else str(value or "not known")
