"""The chat tab: one question to several models at once, side by side. Answering is jobs.asking's, what is kept of a
talk katherine.talks', what is loaded jobs.pool's. Nothing streams from a handler: while somebody answers, the page asks
four times a second how far they are."""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import gradio as gr
from markupsafe import Markup

from jobs import errands
from jobs.pool import View
from katherine import columns, gguf, talks
from katherine.columns import Column
from katherine.errors import KatherineError, NotFound
from katherine.runs import ENDED, State
from katherine.talks import OVER, Answer, Round, Sampling, Talk
from katherine.units import duration, moment, size
from ui import files, runs, tones
from ui.component import HTML, Choice, Data, when_ready
from ui.edge import shown
from ui.held import held
from ui.panel import Live, Panel
from ui.table import Cell, Table
from ui.told import Told

TITLE = "Chat"
WHO = "operator"
# As fast as text is read while it grows, and slow enough for a proxy and a phone.
POLL_SECONDS = 0.25
# As many talks as a person looks through; `app.py talks` lists them all.
LISTED = 100
_TONES = {"waiting": "dim", "loading": "busy", "answering": "busy"}


class _Page:
    """The tab's components and what they show. It keeps nothing of a visitor: which talk is open, what is being edited
    and what was sent last comes with each call."""

    def __init__(self, panel: Panel):
        self.panel = panel
        self._titles = lru_cache(maxsize=2 * LISTED)(self._titles_of)
        with gr.Row(visible=False, elem_classes="k-wanted") as self.wanted:
            self.wanted_by = _html()
            self.give = gr.Button("Give it the GPU now", size="sm", min_width=160, scale=0)
            self.keep = gr.Button("Five more minutes", size="sm", min_width=150, scale=0)
        self.nothing = _html()
        with gr.Column(visible=False, elem_classes="k-setup") as self.setup:
            self.picker = Choice([], multiselect=True, label="Models to talk to, side by side", elem_id="chat-models")
            with gr.Row(elem_classes="k-base"):
                self.base = _html()
                self.make_base = gr.Button("Make the base's file", visible=False, size="sm", min_width=160, scale=0)
                self.stop_base = gr.Button(
                    "Stop making it", visible=False, variant="stop", size="sm", min_width=130, scale=0
                )
            with gr.Accordion("System prompt, seed and sampling", open=False):
                self.system = gr.Textbox(
                    label="System prompt",
                    info="Training had none: use it to try to break the persona.",
                    lines=2,
                    max_lines=8,
                )
                self.sampling = _sampling_fields()
        with gr.Column(visible=False, elem_classes="k-talk") as self.talk:
            with gr.Row(elem_classes="k-talk-head"):
                self.head = _html()
                self.fresh = gr.Button("New talk", size="sm", min_width=100, scale=0)
                self.discard = gr.Button("Remove …", size="sm", min_width=90, scale=0)
            with gr.Group(visible=False, elem_classes="k-again") as self.condemned:
                gr.HTML("<p>Remove this talk, for good?</p>")
                with gr.Row():
                    self.discard_now = gr.Button("Remove it", variant="stop", size="sm", min_width=110, scale=0)
                    self.leave = gr.Button("Leave it", size="sm", min_width=110, scale=0)
            with gr.Column(elem_classes="k-talk-box"):
                self.past, self.now = _rounds(leads=False), _rounds(leads=True)
        with gr.Column(visible=False, elem_classes="k-composer") as self.composer:
            with gr.Row(visible=False, elem_classes="k-editing") as self.rewording:
                self.reworded = _html()
                self.cancel = gr.Button("Do not edit", size="sm", min_width=110, scale=0)
            with gr.Row(elem_classes="k-ask"):
                self.question = gr.Textbox(
                    show_label=False,
                    label="Question",
                    placeholder="Ask them all. Enter sends, Shift+Enter begins a new line.",
                    lines=1,
                    max_lines=8,
                    container=False,
                    min_width=260,
                    scale=8,
                    elem_id="chat-question",
                )
                self.send = gr.Button("Send", variant="primary", min_width=84, scale=1)
                self.stop = gr.Button("Stop", variant="stop", interactive=False, min_width=84, scale=1)
                self.again = gr.Button("Again", visible=False, min_width=150, scale=1)
            self.status = HTML(
                "",
                html_template="<p class='k-status k-dim' role='status'></p>",
                js_on_load=_STATUS,
                apply_default_css=False,
            )
        self.loaded = Data(
            None,
            html_template="<div class='k-loaded'></div>",
            js_on_load=when_ready("katherineTalk.loaded(element, props, watch, trigger)", "katherineTalk"),
            apply_default_css=False,
            elem_classes="k-loaded-list",
        )
        gr.HTML("Earlier talks", elem_classes="k-section")
        self.list = Table(
            ("Begun", "First question", "Questions#", "Models"),
            "No talk yet. What you ask is kept, and can be read, downloaded and gone on with here.",
            selects=True,
        )
        self.open = HTML(
            "",
            html_template="",
            js_on_load=when_ready("katherineTalk.kept(props, watch, trigger, 'katherine-talk')", "katherineTalk"),
            apply_default_css=False,
            visible="hidden",
        )
        # The question that is being reworded: {"talk": id, "round": its number}.
        self.editing = held(None)
        self.marks = held({})
        self.timer = gr.Timer(POLL_SECONDS, active=False)

    @property
    def inputs(self) -> list[Any]:
        return [self.open, self.editing, self.picker, self.marks]

    @property
    def growing(self) -> list[Any]:
        """What changes while somebody answers."""
        return [self.past, self.now, self.status, self.send, self.stop, self.again, self.timer, self.marks]

    @property
    def outputs(self) -> list[Any]:
        return [
            *self.growing, self.wanted, self.wanted_by, self.nothing, self.setup, self.picker, self.base,
            self.make_base, self.stop_base, self.talk, self.head, self.condemned, self.composer, self.rewording,
            self.reworded, self.loaded, self.list, self.open, self.editing,
        ]  # fmt: skip

    # ------------------------------------------------------------------------------------------------ handlers

    def refresh(self, opened: str, editing: Any, picked: Any, marks: dict[str, str] | None) -> Any:
        return self._news(opened, editing, picked, marks) or gr.skip()

    def poll(self, opened: str, marks: dict[str, str] | None) -> Any:
        told = Told(marks)
        self._grow(told, self._find(opened))
        return told.values | {self.marks: told.marks} if told.values else gr.skip()

    def ask(
        self, opened: str, editing: Any, picked: Any, marks: dict[str, str] | None, text: str, system: str, *given: Any
    ) -> Any:
        """Sends the question: to the open talk, in place of an earlier one, or as the first of a new talk."""
        asking, question = self.panel.asking, (text or "").strip()
        if not question:
            raise NotFound("There is no question yet: type one.")
        talk = self._find(opened)
        if talk is None:
            opened = self._begin(picked, system, given, question)
        elif editing and editing["talk"] == talk.id:
            asking.edit(talk.id, int(editing["round"]), question)
        else:
            asking.ask(talk.id, question)
        return self._news(opened, None, picked, marks) | {self.open: opened, self.editing: None, self.question: ""}

    def _begin(self, picked: Any, system: str, given: Sequence[Any], question: str) -> str:
        if not picked:
            raise NotFound("Nobody is asked: choose one model, or several.")
        home = self.panel.home
        sampling = talks.checked(Sampling(**dict(zip(self.sampling, given, strict=True))))
        asked = {column: columns.get(home, column).sha256 for column in picked}
        talk = talks.create(home, who=WHO, role=WHO, files=asked, sampling=sampling, system=(system or "").strip())
        try:
            self.panel.asking.ask(talk.id, question)
        except KatherineError:
            talks.remove(home, talk.id)
            raise
        return talk.id

    def once_more(self, opened: str, editing: Any, picked: Any, marks: dict[str, str] | None) -> Any:
        talk = self._mine(opened)
        self.panel.asking.again(talk.id, _next_seed(talk))
        return self._news(opened, editing, picked, marks)

    def retry(self, opened: str, editing: Any, picked: Any, marks: dict[str, str] | None, event: gr.EventData) -> Any:
        self.panel.asking.retry(self._mine(opened).id, str(event.column))
        return self._news(opened, editing, picked, marks)

    def end(self, opened: str, editing: Any, picked: Any, marks: dict[str, str] | None) -> Any:
        if opened:
            self.panel.asking.stop(self._mine(opened).id)
        return self._news(opened, editing, picked, marks) or gr.skip()

    def reword(self, opened: str, editing: Any, picked: Any, marks: dict[str, str] | None, event: gr.EventData) -> Any:
        """Takes an earlier question into the box; nothing is dropped before it is sent."""
        talk, number = self._mine(opened), int(event.round)
        if not 0 <= number < len(talk.rounds):
            raise NotFound(f"This talk has no question {number + 1}.")
        now = {"talk": talk.id, "round": number}
        return self._news(opened, now, picked, marks) | {
            self.editing: now,
            self.question: talk.rounds[number].question,
        }

    def keep_wording(self, opened: str, editing: Any, picked: Any, marks: dict[str, str] | None) -> Any:
        return self._news(opened, None, picked, marks) | {self.editing: None, self.question: ""}

    def choose(self, opened: str, editing: Any, picked: Any, marks: dict[str, str] | None, event: gr.EventData) -> Any:
        talk_id = self._mine(str(event.id)).id
        return self._news(talk_id, None, picked, marks) | {self.open: talk_id} | self._at_rest()

    def begin_anew(self, opened: str, editing: Any, picked: Any, marks: dict[str, str] | None) -> Any:
        """The form again, with what the open talk was asked with."""
        before = self._find(opened)
        offered = {column.id for column in self._columns()}
        kept = [column for column in before.columns if column in offered] if before else picked
        values = self._news("", None, kept, marks) | {self.open: "", self.question: ""} | self._at_rest()
        if before:
            values |= {self.picker: self._offer(kept), self.system: before.system}
            values |= {field: getattr(before.sampling, name) for name, field in self.sampling.items()}
        return values

    def remove(self, opened: str, editing: Any, picked: Any, marks: dict[str, str] | None) -> Any:
        talk = self._mine(opened)
        self.panel.asking.stop(talk.id)
        talks.remove(self.panel.home, talk.id)
        return self._news("", None, picked, marks) | {self.open: ""} | self._at_rest()

    def ask_for_base(self, opened: str, editing: Any, picked: Any, marks: dict[str, str] | None) -> Any:
        if export := self._without_base(picked):
            errands.start(self.panel.home, "base", {"export": export}, WHO)
        return self._news(opened, editing, picked, marks) or gr.skip()

    def end_base(self, opened: str, editing: Any, picked: Any, marks: dict[str, str] | None) -> Any:
        for errand in self._base_errands():
            if errand.status().state not in ENDED:
                errands.stop(self.panel.home, errand.id)
        return self._news(opened, editing, picked, marks) or gr.skip()

    def unload(self, opened: str, editing: Any, picked: Any, marks: dict[str, str] | None, event: gr.EventData) -> Any:
        self.panel.pool.unload(str(event.id))
        return self._news(opened, editing, picked, marks) or gr.skip()

    def give_way(self, opened: str, editing: Any, picked: Any, marks: dict[str, str] | None) -> Any:
        self.panel.pool.give_way(WHO)
        return self._news(opened, editing, picked, marks) or gr.skip()

    def go_on(self, opened: str, editing: Any, picked: Any, marks: dict[str, str] | None) -> Any:
        self.panel.pool.keep(WHO)
        return self._news(opened, editing, picked, marks) or gr.skip()

    def _at_rest(self) -> dict[Any, Any]:
        """Nothing is edited, nothing asks for a second word."""
        return {self.editing: None, self.condemned: gr.update(visible=False)}

    # ------------------------------------------------------------------------------------------------ parts

    def _mine(self, talk_id: str) -> Talk:
        """A talk of this tab. Raises NotFound for others: what was said under review is not gone on with."""
        talk = self.panel.asking.view(talk_id)
        if talk.role != WHO or talk.export:
            raise NotFound(f"{talk_id!r} is no talk of this tab.")
        return talk

    def _find(self, talk_id: str) -> Talk | None:
        try:
            return self._mine(talk_id) if talk_id else None
        except KatherineError:
            return None

    def _columns(self) -> list[Column]:
        return columns.everyone(self.panel.home, self.panel.history.runs())

    def _titles_of(self, talk_id: str, of: tuple[str, ...]) -> dict[str, str]:
        return talks.titles(self.panel.home, talks.load(self.panel.home, talk_id))

    def _news(self, opened: str, editing: Any, picked: Any, marks: dict[str, str] | None) -> dict[Any, Any]:
        """Component → value, of those that are not what they were."""
        told = Told(marks)
        talk = self._find(opened)
        offered = self._columns()
        told.visible("setup", self.setup, talk is None and bool(offered))
        told.visible("talk", self.talk, talk is not None)
        told.visible("composer", self.composer, talk is not None or bool(offered))
        told.say("nothing", self.nothing, _nothing(opened, talk, offered))
        told.tell("picker", self.picker, [column.id for column in offered], lambda: self._offer(picked, offered))
        if talk is None:
            self._follow_base(told, picked)
        told.say("head", self.head, self._described(talk) if talk else Markup())
        reworded = talk is not None and bool(editing) and editing["talk"] == talk.id
        told.visible("rewording", self.rewording, reworded)
        told.say("reworded", self.reworded, _rewording(talk, editing) if talk and reworded else Markup())
        self._grow(told, talk)
        self._pooled(told)
        self._listed(told, opened)
        return told.values | {self.marks: told.marks} if told.values else {}

    def _grow(self, told: Told, talk: Talk | None) -> None:
        answering = bool(talk and talk.rounds and not talk.rounds[-1].is_over)
        titles = self._titles(talk.id, talk.columns) if talk else {}
        for name, component, first in (("past", self.past, True), ("now", self.now, False)):
            drawn = _drawn(talk, titles, past=first)
            told.tell(name, component, drawn, partial(dict, drawn))
        told.tell("status", self.status, words := _status(talk, titles), lambda: words)
        # A question that nobody answers yet can be sent; one more while they answer can not.
        told.tell("send", self.send, answering, lambda: gr.update(interactive=not answering))
        told.tell("stop", self.stop, answering, lambda: gr.update(interactive=answering))
        label = f"Again, seed {_next_seed(talk)}" if talk and talk.rounds and talk.sampling.temperature else ""
        told.tell(
            "again",
            self.again,
            [label, answering],
            lambda: gr.update(value=label or "Again", visible=bool(label), interactive=not answering),
        )
        told.tell("timer", self.timer, answering, lambda: gr.Timer(active=answering))

    def _offer(self, picked: Any, offered: list[Column] | None = None) -> Any:
        """The list of models; the newest export's quants are chosen where nothing else is."""
        offered = self._columns() if offered is None else offered
        exports = list(dict.fromkeys(column.export for column in offered if column.export))
        there = {column.id for column in offered}
        kept = [column for column in picked or () if column in there]
        newest = [column for column in offered if exports and column.export == exports[0]]
        quants = [column.id for column in newest if column.quant != gguf.UNQUANTISED]
        return gr.update(
            choices=[(_option(column, len(exports) > 1), column.id) for column in offered],
            value=kept or quants or [column.id for column in newest],
        )

    def _described(self, talk: Talk) -> Markup:
        titles = self._titles(talk.id, talk.columns)
        sampling = talk.sampling
        facts = {
            "Models": ", ".join(titles.values()),
            "Seed": str(sampling.seed),
            "Temperature": f"{sampling.temperature:g}" if sampling.temperature else "0, always the likeliest word",
            "At most": f"{sampling.max_new_tokens:,} tokens",
            "Begun": moment(talk.created),
        }
        links = [
            Markup('<a href="{}" download>{}</a>').format(files.talk_address(talk.id, ending), name)
            for ending, name in (("json", "JSON"), ("md", "Markdown"))
        ]
        parts = [
            runs.described(facts.items()),
            Markup('<div class="k-files"><span class="k-dim">Download</span> {}</div>').format(Markup(" ").join(links)),
        ]
        if talk.system:
            prompt = '<details class="k-system"><summary>With a system prompt</summary><pre>{}</pre></details>'
            parts.append(Markup(prompt).format(talk.system))
        return Markup().join(parts)

    # The base without the adapter: its file is made once, by an errand.

    def _without_base(self, picked: Any) -> str | None:
        """The export whose base has no file yet: of those picked, else the newest."""
        offered = self._columns()
        export_of = {column.id: column.export for column in offered}
        for export in dict.fromkeys([*(export_of.get(column) for column in picked or ()), *export_of.values()]):
            if export:
                try:
                    return None if columns.base_of(self.panel.home, export) else export
                except KatherineError:
                    continue
        return None

    def _base_errands(self) -> list[errands.Errand]:
        return [errand for errand in errands.everyone(self.panel.home) if errand.kind == "base"]

    def _follow_base(self, told: Told, picked: Any) -> None:
        export = self._without_base(picked)
        made = self._base_errands() if export else []
        last = next((errand for errand in made if errand.request.get("export") == export), None)
        status = last.status() if last else None
        going = status is not None and status.state not in ENDED
        told.visible("make base", self.make_base, bool(export) and not going)
        told.visible("stop base", self.stop_base, going)
        said = Markup()
        if status is not None and going:
            step = f", {status.step:,} of {status.of:,}" if status.of else ""
            spent = duration(status.seconds // 10 * 10)
            said = Markup('<p><span class="k-tone k-busy">Making the base\'s file</span>: {}{} {}</p>').format(
                status.phase, step, Markup('<span class="k-dim">{}</span>').format(spent)
            )
        elif export:
            failed = status is not None and status.state in (State.failed, State.interrupted)
            said = Markup('<p class="k-dim">{}</p>').format(
                "The base without the adapter can be asked too. Its file is made once, and then stands in the list."
            )
            if status is not None and failed:
                said = Markup('<p class="k-bad">{} {}</p>').format(status.reason, status.remedy)
        told.say("base", self.base, said)

    def _pooled(self, told: Told) -> None:
        view = self.panel.pool.view()
        told.visible("wanted", self.wanted, bool(view.wanted_by))
        told.say("wanted by", self.wanted_by, _wanted(view) if view.wanted_by else Markup())
        value = _loaded(view, {each.column: self._title(each.column) for each in view.loaded})
        told.tell("loaded", self.loaded, value, lambda: value)

    def _title(self, column_id: str) -> str:
        """Of a column that any talk has loaded."""
        try:
            column = columns.get(self.panel.home, column_id)
        except KatherineError:
            return column_id
        return _option(column, several=True)

    def _listed(self, told: Told, opened: str) -> None:
        every = [talk for talk in talks.everyone(self.panel.home, WHO, LISTED) if talk.rounds and not talk.export]
        rows = [
            [
                Cell(moment(talk.created), sort=talk.created),
                _shortened(talk.rounds[0].question),
                len(talk.rounds),
                ", ".join(self._titles(talk.id, talk.columns).values()),
            ]
            for talk in every
        ]
        ids = [talk.id for talk in every]
        told.tell("list", self.list, [rows, ids, opened], lambda: self.list.rows(rows, ids, selected=opened or None))


def _html() -> HTML:
    """Words on the page, with colours of their own. On a phone they stand above the buttons beside them."""
    return HTML("", apply_default_css=False, js_on_load=None, min_width=260)


def _rounds(*, leads: bool) -> Data:
    call = f"katherineTalk.rounds(element, props, watch, trigger, {str(leads).lower()})"
    return Data(
        None,
        html_template="<div class='k-rounds'></div>",
        js_on_load=when_ready(call, "katherineTalk"),
        apply_default_css=False,
        elem_classes="k-now" if leads else "k-past",
    )


def _sampling_fields() -> dict[str, Any]:
    """A field for each value of Sampling, by its name."""
    usual = Sampling()
    with gr.Row():
        seed = gr.Number(usual.seed, label="Seed", precision=0, minimum=0, min_width=120)
        temperature = gr.Slider(
            0, 2, usual.temperature, step=0.05, label="Temperature", info="0: always the likeliest word", min_width=220
        )
        most = gr.Number(usual.max_new_tokens, label="Tokens at most", precision=0, minimum=1, min_width=120)
    with gr.Row():
        top_p = gr.Slider(0, 1, usual.top_p, step=0.01, label="Top p", min_width=160)
        top_k = gr.Number(usual.top_k, label="Top k", info="0: all", precision=0, minimum=0, min_width=120)
        min_p = gr.Slider(0, 1, usual.min_p, step=0.01, label="Min p", min_width=160)
    return {
        "seed": seed,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "max_new_tokens": most,
    }


def _option(column: Column, several: bool) -> str:
    """A model in the list; `several` exports are told apart by the end of their ids."""
    title = columns.title(column)
    return f"{title} · {tones.short(column.export)}" if several and column.export else title


def _next_seed(talk: Talk) -> int:
    return talk.rounds[-1].sampling.seed + 1 if talk.rounds else talk.sampling.seed


def _shortened(text: str, most: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _nothing(opened: str, talk: Talk | None, offered: Sequence[Column]) -> Markup:
    said = ""
    if opened and talk is None:
        said = "The talk that was open here is gone. What you ask now begins another."
    elif talk is None and not offered:
        said = "There is nobody to talk to yet: export a trained run in the Export tab, and its quants come here."
    return Markup('<p class="k-empty">{}</p>').format(said) if said else Markup()


def _rewording(talk: Talk, editing: Any) -> Markup:
    number = int(editing["round"])
    dropped = len(talk.rounds) - number - 1
    after = ""
    if dropped:
        after = (
            " The question after it is dropped." if dropped == 1 else f" The {dropped} questions after it are dropped."
        )
    return Markup("<p>Editing question {} of {}. When you send, it is answered anew.{}</p>").format(
        number + 1, len(talk.rounds), after
    )


def _drawn(talk: Talk | None, titles: dict[str, str], *, past: bool) -> dict[str, Any]:
    """As static/chat.js draws it: all rounds but the last one, or the last one alone."""
    if talk is None:
        return {"talk": "", "rounds": []}
    numbered = list(enumerate(talk.rounds))
    return {
        "talk": talk.id,
        "rounds": [
            {
                "number": number,
                "question": each.question,
                "aside": f"seed {each.sampling.seed}" if each.sampling.seed != talk.sampling.seed else "",
                "answers": [_answered(answer, titles, last=not past) for answer in each.answers],
            }
            for number, each in (numbered[:-1] if past else numbered[-1:])
        ],
    }


def _answered(answer: Answer, titles: dict[str, str], *, last: bool) -> dict[str, Any]:
    back = {"failed": "Bring it back", "stopped": "Ask it again"}.get(answer.state, "") if last else ""
    ending = talks.ending(answer)
    tone = _TONES.get(answer.state, "")
    if ending:
        tone = {"failed": "bad", "stopped": "warn", "cut at the limit": "warn"}.get(ending, "")
    return {
        "column": answer.column,
        "title": titles.get(answer.column, answer.column),
        "words": ending or answer.state,
        "tone": tone,
        "busy": answer.state not in OVER,
        "bad": answer.state == "failed",
        "text": answer.text,
        "note": answer.note,
        "facts": " · ".join(talks.measured(answer)),
        "back": back,
    }


def _status(talk: Talk | None, titles: dict[str, str]) -> str:
    """One line, which a screen reader says: that they answer, and once all have ended how."""
    if talk is None or not talk.rounds:
        return ""
    last = talk.rounds[-1]
    if not last.is_over:
        return "They are answering …" if len(last.answers) > 1 else "It is answering …"
    said = [
        f"{_named(last, titles, state)} {words}"
        for state, words in (("done", "answered"), ("stopped", "stopped"), ("failed", "failed"))
        if any(answer.state == state for answer in last.answers)
    ]
    return f"{'; '.join(said)}."


def _named(asked: Round, titles: dict[str, str], state: str) -> str:
    names = [titles.get(answer.column, answer.column) for answer in asked.answers if answer.state == state]
    if len(names) == len(asked.answers) > 1:
        return f"All {len(names)}"
    return ", ".join(names)


def _wanted(view: View) -> Markup:
    # Whole tens of seconds: the page is sent only what changed.
    left = view.gives_way_in or 0.0
    when = f"in {duration(-(-left // 10) * 10)}" if left else "now"
    text = Markup("<p>Run <b>{}</b> waits for the GPU. It gets it {}; what is loaded here is unloaded then.</p>")
    return text.format(tones.short(view.wanted_by), when)


def _loaded(view: View, titles: Mapping[str, str]) -> dict[str, Any]:
    """As static/chat.js draws it. Rounded, so that it is at rest while nobody loads."""
    if not view.loaded:
        return {"words": "", "columns": []}
    kind = "GPU memory" if view.on_gpu else "memory"
    return {
        "words": f"In {kind}, {_rounded(view.used)} in all, {_rounded(view.free)} free:",
        "columns": [
            {
                "id": each.column,
                "title": titles[each.column],
                "words": f"{_rounded(each.bytes)}, loading" if each.state == "loading" else _rounded(each.bytes),
            }
            for each in view.loaded
        ],
    }


def _rounded(count: int) -> str:
    """Bytes to two figures."""
    return size(float(f"{count:.2g}"))


_STATUS = """
const line = element.querySelector('p');
const say = () => { if (line.textContent !== (props.value || '')) line.textContent = props.value || ''; };
watch('value', say);
say();
"""


def build(panel: Panel) -> Live:
    page = _Page(panel)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    asked = [*page.inputs, page.question, page.system, *page.sampling.values()]
    answered = [*page.outputs, page.question]
    for event in (page.send.click, page.question.submit):
        event(shown(page.ask), asked, answered, **quiet)
    for event, handler in (
        (page.now.edit, page.reword),
        (page.past.edit, page.reword),
        (page.cancel.click, page.keep_wording),
    ):
        event(shown(handler), page.inputs, answered, **quiet)
    for event, handler in (
        (page.stop.click, page.end),
        (page.again.click, page.once_more),
        (page.now.retry, page.retry),
        (page.list.select, page.choose),
        (page.open.select, page.refresh),
        (page.discard_now.click, page.remove),
        (page.make_base.click, page.ask_for_base),
        (page.stop_base.click, page.end_base),
        (page.loaded.select, page.unload),
        (page.give.click, page.give_way),
        (page.keep.click, page.go_on),
        (page.picker.input, page.refresh),
    ):
        event(shown(handler), page.inputs, page.outputs, **quiet)
    everything = [*answered, page.system, *page.sampling.values()]
    page.fresh.click(shown(page.begin_anew), page.inputs, everything, **quiet)
    page.discard.click(lambda: gr.update(visible=True), outputs=page.condemned, **quiet)
    page.leave.click(lambda: gr.update(visible=False), outputs=page.condemned, **quiet)
    page.timer.tick(shown(page.poll), [page.open, page.marks], page.growing, queue=False, **quiet)
    return Live(page.refresh, page.outputs, page.inputs, every=2.0)
