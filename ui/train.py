"""The train tab: start, watch, stop, resume, run again. What is drawn is plots' business; every operation is jobs'."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gradio as gr
from markupsafe import Markup

from jobs import pipeline, queue
from katherine import drafts, logs, pace, prediction, recipe, runs
from katherine.errors import KatherineError, NotFound
from katherine.history import Seen
from katherine.pace import Pace
from katherine.runs import ENDED, State
from katherine.settings import Home
from katherine.units import duration, moment
from ui import files, plots, tones
from ui.component import HTML, Choice
from ui.edge import message, shown
from ui.figure import Figure
from ui.held import held
from ui.panel import Live, Panel
from ui.runs import described, named
from ui.table import Cell, Table
from ui.told import Told
from ui.upcoming import Upcoming

TITLE = "Train"
WHO = "operator"
# The picker's choice that follows the work: the run under way, then the next.
FOLLOW = ""
FOLLOWED = "The run under way, else the next, else the newest"
STATES = {
    State.queued: "Queued",
    State.running: "Running",
    State.stopping: "Stopping",
    State.succeeded: "Succeeded",
    State.failed: "Failed",
    State.cancelled: "Stopped",
    State.interrupted: "Interrupted",
}
LOG_LINES = 150

_LOG = """
const box = element.querySelector('.k-log');
let run = null;
const draw = () => {
  const value = props.value || { run: '', text: '' };
  const atEnd = run !== value.run || box.scrollHeight - box.scrollTop - box.clientHeight < 12;
  run = value.run;
  box.textContent = value.text;
  if (atEnd) box.scrollTop = box.scrollHeight;
};
watch('value', draw);
draw();
"""


def followed(seen: Sequence[Seen]) -> Seen | None:
    """The run that is shown unless another is chosen: the one under way, else the next in the queue, else the newest.
    `seen` is newest first."""
    waiting = [each for each in seen if each.status.state is State.queued]
    under_way = [each for each in seen if each.status.state in (State.running, State.stopping)]
    return next(iter(under_way or waiting[::-1] or seen), None)


def build(panel: Panel) -> Live:
    return _Page(panel).live


class _Page:
    """The tab's components, and the handlers that fill them. It remembers nothing of a visitor."""

    def __init__(self, panel: Panel):
        self._panel = panel
        self._home = panel.home
        self._curves = panel.curves
        self._upcoming = Upcoming(panel.home)
        self._lay_out()
        self.live = Live(self._refresh, self._outputs, self._inputs, every=2.0)
        self._wire()

    # ------------------------------------------------------------------------------------------- components

    def _lay_out(self) -> None:
        with gr.Row(elem_classes="k-start"):
            with gr.Column(min_width=300, scale=3):
                self.draft = _page()
            with gr.Column(min_width=300, scale=2):
                with gr.Row():
                    self.start_pipeline = gr.Button(
                        "Queue the whole pipeline", size="sm", variant="primary", min_width=150
                    )
                    self.start_sft = gr.Button("Start SFT", size="sm", min_width=110)
                with gr.Row(elem_classes="k-low"):
                    self.on = Choice([], label="SFT run to build on", min_width=180, scale=3)
                    self.start_dpo = gr.Button("Start DPO on it", size="sm", min_width=110, scale=2)
        self.queued = Table(
            ("#", "Run", "State", "Steps", "Pace", "Left"),
            "Nothing is under way. Start SFT, or queue the whole pipeline.",
            selects=True,
            elem_classes="k-queue",
        )
        with gr.Row(elem_classes="k-low"):
            self.picker = Choice([(FOLLOWED, FOLLOW)], value=FOLLOW, label="Run shown", min_width=260, scale=3)
            self.stop = gr.Button("Stop and keep", size="sm", interactive=False, min_width=120)
            self.kill = gr.Button("Kill…", size="sm", interactive=False, min_width=90)
            self.resume = gr.Button("Resume", size="sm", interactive=False, min_width=90)
            self.rerun = gr.Button("Rerun with changes", size="sm", interactive=False, min_width=150)
        with gr.Row(visible=False, elem_classes="k-confirm") as self.confirm:
            with gr.Column(min_width=260, scale=3):
                self.condemned = _page()
            self.kill_now = gr.Button("Kill it", size="sm", variant="stop", min_width=90)
            self.let_live = gr.Button("Leave it running", size="sm", min_width=120)
        self.chosen = _page()
        with gr.Row(elem_classes="k-low"):
            self.past = Choice(
                [],
                multiselect=True,
                max_choices=plots.MOST_PAST,
                label="Lay past runs over",
                min_width=260,
                scale=3,
            )
            self.smoothing = gr.Slider(0, 0.99, 0.6, step=0.01, label="Smoothing", min_width=180, scale=2)
        self.odd = _page()
        with gr.Row(elem_classes="k-figures"):
            self.figures = {
                name: Figure("Nothing has been logged yet.", height=240, visible=False) for name in plots.NAMES
            }
        with gr.Row(elem_classes="k-low"):
            with gr.Column(min_width=200, scale=2):
                self.log_link = _page()
            self.wanted = gr.Textbox(label="Search the log", placeholder="text, then Enter", min_width=200, scale=3)
            self.search_on = gr.Button("Search on", size="sm", visible=False, min_width=100)
        self.found = _page()
        self.log = HTML(
            None,
            html_template="<pre class='k-log' tabindex='0' aria-label='Log'></pre>",
            js_on_load=_LOG,
            apply_default_css=False,
        )
        # What the page shows, as it says itself: see Told. `at` is where a search goes on, `doomed` the run to kill.
        self.seen, self.at, self.doomed = (held({}) for _ in range(3))
        self._inputs = [self.picker, self.past, self.smoothing, self.seen]
        self._outputs = [
            self.draft, self.on, self.start_sft, self.start_pipeline, self.start_dpo, self.queued, self.picker,
            self.stop, self.kill, self.resume, self.rerun, self.chosen, self.past, self.odd, *self.figures.values(),
            self.log_link, self.log, self.found, self.seen,
        ]  # fmt: skip

    def _wire(self) -> None:
        def on(event: Any, handler: Callable, inputs: Sequence[Any], outputs: Sequence[Any], **more: Any) -> Any:
            return event(
                shown(handler),
                inputs=list(inputs),
                outputs=list(outputs),
                show_progress="hidden",
                api_visibility="private",
                **more,
            )

        for event in (self.picker.change, self.past.change, self.smoothing.release):
            # Always the last value: while one is answered, another may have been chosen.
            on(event, self._refresh, self._inputs, self._outputs, trigger_mode="always_last")
        on(self.queued.select, self._choose, [], [self.picker])

        pressed: tuple[tuple[gr.Button, Callable, list[Any], list[Any]], ...] = (
            (self.start_sft, self._start_sft, [], [self.picker]),
            (self.start_pipeline, self._start_pipeline, [], [self.picker]),
            (self.start_dpo, self._start_dpo, [self.on], [self.picker]),
            (self.stop, self._stop, [self.seen], []),
            (self.kill_now, self._kill, [self.doomed], [self.confirm]),
            (self.resume, self._resume, [self.seen], []),
        )
        for button, handler, inputs, outputs in pressed:
            on(on(button.click, handler, inputs, outputs).success, self._refresh, self._inputs, self._outputs)
        on(self.kill.click, self._condemn, [self.seen], [self.confirm, self.condemned, self.doomed])
        on(self.let_live.click, lambda: gr.update(visible=False), [], [self.confirm])
        on(self.rerun.click, self._rerun, [self.seen], []).success(None, js="() => { katherine.openTab('recipe'); }")

        searched = [self.found, self.at, self.search_on]
        on(self.wanted.submit, self._search, [self.wanted, self.seen], searched)
        on(self.search_on.click, self._search, [self.wanted, self.seen, self.at], searched)

    # --------------------------------------------------------------------------------------------- handlers

    def _start_sft(self) -> Any:
        draft = self._draft()
        return self._switch(pipeline.start(self._home, draft.dataset, draft.values["sft"], None, None, WHO))

    def _start_pipeline(self) -> Any:
        draft = self._draft()
        return self._switch(pipeline.start(self._home, draft.dataset, who=WHO, **draft.asked()))

    def _start_dpo(self, on: str | None) -> Any:
        if not on:
            raise NotFound("Choose the SFT run that DPO is to build on. If there is none, start SFT first.")
        draft = drafts.load(self._home)
        return self._switch(pipeline.start_on(self._home, on, {"dpo": draft.values["dpo"]}, WHO, draft.dataset))

    def _draft(self) -> Any:
        draft = drafts.load(self._home)
        if draft.dataset is None:
            raise NotFound("Choose a dataset first: on the Dataset tab, “Use this dataset”.")
        return draft

    def _switch(self, queued: Sequence[runs.Run]) -> Any:
        """To the run that was started. One that comes next is followed, so that the page goes on with what builds on
        it; one that waits behind other work is shown itself."""
        every = self._panel.history.runs()
        next_one = followed(every)
        value = FOLLOW if next_one and next_one.id == queued[0].id else queued[0].id
        gr.Info(message(f"Queued: {', '.join(named(run.record.kind) for run in queued)}."), 4)
        return Choice(choices=_choices(every), value=value)

    def _choose(self, event: gr.EventData) -> Any:
        run_id = str(event.id)
        self._panel.history.get(run_id)
        return Choice(choices=_choices(self._panel.history.runs()), value=run_id)

    def _stop(self, seen: Any) -> None:
        status = queue.stop(self._home, _run_of(seen))
        said = (
            "Stopped before it began." if status.state in ENDED else "It keeps its work at the step's end, and stops."
        )
        gr.Info(said, 4)

    def _condemn(self, seen: Any) -> Any:
        run = self._panel.history.get(_run_of(seen))
        text = Markup(
            "<p class='k-warn'>Kill run {}? It ends within seconds; what its last checkpoint lacks is lost.</p>"
        ).format(run.id)
        return gr.update(visible=True), text, {"run": run.id}

    def _kill(self, doomed: Any) -> Any:
        queue.stop(self._home, _run_of(doomed), kill=True)
        return gr.update(visible=False)

    def _resume(self, seen: Any) -> None:
        queue.resume(self._home, _run_of(seen))

    def _rerun(self, seen: Any) -> None:
        record = self._panel.history.get(_run_of(seen)).run.record
        said = drafts.use_run(self._home, record.id).remarks
        if record.dataset and (self._home.datasets / record.dataset).is_dir():
            drafts.change(self._home, dataset=record.dataset)
        gr.Info(message(f"The recipe of run {record.id} is loaded: change it and start. {' '.join(said)}"), 8)

    def _search(self, text: str, seen: Any, at: Any = None) -> Any:
        text = (text or "").strip()
        run_id = at["run"] if at else _run_of(seen)
        start = int(at["line"]) if at else 1
        found = logs.search(self._panel.history.get(run_id).run, text, start=start)
        if found.lines:
            lines = Markup("").join(
                Markup("<li value='{}'><code>{}</code></li>").format(line.number, line.text) for line in found.lines
            )
            page = Markup("<ol class='k-found'>{}</ol>").format(lines)
        elif text:
            where = f"up to line {found.next:,}" if found.next else f"from line {start:,} on" if at else "in the log"
            page = Markup("<p class='k-empty'>“{}” is not {}.</p>").format(text, where)
        else:
            page = Markup("")
        at = {"run": run_id, "line": found.next} if found.next else {}
        return page, at, gr.update(visible=bool(at))

    # ---------------------------------------------------------------------------------------------- refresh

    def _refresh(self, picked: Any, past: Any, weight: Any, seen: Any) -> Any:
        every = self._panel.history.runs()
        by_id = {each.id: each for each in every}
        run = by_id.get(picked) if picked else followed(every)
        news = Told(seen if isinstance(seen, dict) else None)
        self._tell_start(news, every)
        under_way = [each for each in every if each.status.state not in ENDED]
        paces = {each.id: pace.of(each.run, each.status) for each in under_way}
        self._tell_queue(news, under_way, paces, run)
        ids = _joined(every)
        news.tell("picker", self.picker, ids, lambda: Choice(choices=_choices(every)))
        news.marks["run"] = run.id if run else ""
        self._tell_chosen(news, run, bool(picked), paces)
        kind = run.kind if run else ""
        news.tell("past", self.past, f"{ids} {run and run.id}", lambda: Choice(choices=_comparable(every, run)))
        over = [by_id[each] for each in past or () if each in by_id and by_id[each].kind == kind and by_id[each] != run]
        self._tell_figures(news, run, over, float(weight or 0))
        self._tell_log(news, run)
        if not news.values and news.marks == seen:
            return gr.skip()
        return {**news.values, self.seen: news.marks}

    def _tell_start(self, news: Told, every: Sequence[Seen]) -> None:
        draft, page = self._upcoming.get()
        news.tell("draft", self.draft, page, lambda: page)
        bases = [each for each in every if each.kind == "sft" and each.status.state is State.succeeded]
        # The newest is offered at first; a choice that was made stays.
        offered: dict[str, Any] = {"value": bases[0].id} if bases and not news.marks.get("offered") else {}
        news.marks["offered"] = "yes" if bases else ""
        news.tell("on", self.on, _joined(bases), lambda: gr.update(choices=_named(bases), **offered))
        for button, name, possible in (
            (self.start_sft, "start_sft", draft.dataset is not None),
            (self.start_pipeline, "start_pipeline", draft.dataset is not None),
            (self.start_dpo, "start_dpo", bool(bases)),
        ):
            news.tell(name, button, str(possible), partial(gr.Button, interactive=possible))

    def _tell_queue(self, news: Told, under_way: Sequence[Seen], paces: dict[str, Pace], run: Seen | None) -> None:
        # As they will be carried out: oldest first, behind the one that is.
        waiting = sorted(reversed(under_way), key=lambda each: each.status.state is State.queued)
        rows = []
        for place, each in enumerate(waiting, 1):
            speed = paces[each.id]
            steps = f"{each.status.step:,} of {each.status.of:,}" if each.status.of else ""
            rows.append(
                [
                    str(place),
                    _label(each),
                    Cell(_stated(each), tone=tones.of(each.status.state)),
                    steps,
                    _rate(speed.seconds_per_step),
                    duration(speed.seconds_left),
                ]
            )
        value = self.queued.rows(rows, [each.id for each in waiting], run.id if run else None)
        news.tell("queued", self.queued, repr(value), lambda: value)

    def _tell_chosen(self, news: Told, run: Seen | None, picked: bool, paces: dict[str, Pace]) -> None:
        page = _chosen(self._panel, run, paces.get(run.id, Pace())) if run else _nothing(picked)
        news.tell("chosen", self.chosen, page, lambda: page)
        # What was found belongs to the run that was searched.
        news.tell("found", self.found, run.id if run else "", lambda: "")
        state = run.status.state if run else State.succeeded
        asked = run is not None and queue.control(run.run).exists()
        for button, name, possible in (
            (self.stop, "stop", state is State.queued or (state is State.running and not asked)),
            (self.kill, "kill", state in (State.running, State.stopping)),
            (self.resume, "resume", state in (State.failed, State.cancelled, State.interrupted)),
            (self.rerun, "rerun", run is not None and run.kind in recipe.KINDS),
        ):
            news.tell(name, button, str(possible), partial(gr.Button, interactive=possible))

    def _tell_figures(self, news: Told, run: Seen | None, past: Sequence[Seen], weight: float) -> None:
        weight = min(max(weight, 0.0), 0.99)
        drawn: dict[str, Any] = {}
        page = ""
        if run is None or run.kind not in plots.PLOTS:
            if not news.is_news("figures", ""):
                return
        else:
            main = self._drawn(run)
            laid_over = [self._drawn(each) for each in past]
            if not news.is_news("figures", plots.mark(run.kind, main, laid_over, weight)):
                return
            drawn = plots.draw(run.kind, main, laid_over, weight)
            if odd := plots.odd(run.kind, main):
                page = Markup("<p class='k-warn'>No finite number, and so a gap: {}.</p>").format("; ".join(odd))
        for name, figure in self.figures.items():
            # An update has Gradio make the component anew, a value does not.
            if news.is_news(f"{name} is shown", name in drawn):
                news.values[figure] = gr.update(value=drawn.get(name), visible=name in drawn)
            elif name in drawn:
                news.values[figure] = drawn[name]
        news.values[self.odd] = page

    def _drawn(self, seen: Seen) -> plots.Shown:
        return plots.Shown(seen.id, _label(seen), self._curves.read(seen.run.path / "metrics.jsonl"))

    def _tell_log(self, news: Told, run: Seen | None) -> None:
        mark = logs.mark(run.run) if run else ""
        # Its size to the megabyte, so that the link is not made again with every line.
        link = f"{run.id} {bool(mark)} {logs.size(run.run) // 1_000_000}" if run else ""
        news.tell("log_link", self.log_link, link, lambda: _log_link(run))
        news.tell(
            "log",
            self.log,
            f"{run and run.id} {mark}",
            lambda: {"run": run.id, "text": "\n".join(logs.tail(run.run, LOG_LINES))} if run else None,
        )


def _label(seen: Seen) -> str:
    """Enough to know a run by in a list: kind, when, on what, and the end of its id."""
    record = seen.run.record
    kind = named(record.kind)
    when = moment(record.created).removesuffix(" UTC")
    return " · ".join(part for part in (kind, when, record.dataset, record.id.rpartition("-")[2]) if part)


def _choices(every: Sequence[Seen]) -> list[tuple[str, str]]:
    return [(FOLLOWED, FOLLOW), *_named(every)]


def _named(every: Sequence[Seen]) -> list[tuple[str, str]]:
    return [(_label(each), each.id) for each in every]


def _comparable(every: Sequence[Seen], run: Seen | None) -> list[tuple[str, str]]:
    return [(_label(each), each.id) for each in every if run and each.kind == run.kind and each.id != run.id]


def _joined(every: Sequence[Seen]) -> str:
    return " ".join(each.id for each in every)


def _run_of(kept: Any) -> str:
    run_id = kept.get("run") if isinstance(kept, dict) else None
    if not run_id:
        raise NotFound("No run is shown: choose one first.")
    return str(run_id)


def _rate(seconds: float | None) -> str:
    """A step's time to three figures, since 1.66 s and 2 s are worlds apart in an hour."""
    if seconds is None:
        return ""
    return f"{seconds:.3g} s a step" if seconds < 100 else f"{duration(seconds)} a step"


def _stated(seen: Seen) -> str:
    status = seen.status
    words = STATES[status.state]
    return f"{words}: {status.phase}" if status.phase and status.state not in ENDED else words


def _chosen(panel: Panel, seen: Seen, speed: Pace) -> str:
    tone = tones.of(seen.status.state)
    head = Markup("<h3><span class='k-tone k-{}'>{}</span> <span>{}</span> <code>{}</code></h3>").format(
        tone, _stated(seen), named(seen.kind), seen.id
    )
    return Markup("<div class='k-run'>{}{}{}{}</div>").format(
        head, _ending(panel.home, seen, tone), _bar(seen, tone), _facts(panel, seen, speed)
    )


def _ending(home: Home, seen: Seen, tone: str) -> str:
    """Why it ended so, or waits, and what to do."""
    status = seen.status
    reason = status.reason
    if status.state is State.queued and not reason:
        above = seen.run.record.parent
        if queue.blocked(home, seen.run):
            reason = f"It waits for run {above}, which was interrupted: resume that one."
        elif above:
            reason = f"It begins when run {above} has succeeded."
        else:
            reason = "It begins when the runs before it are done."
    if not reason:
        return Markup("")
    return Markup("<p class='k-reason k-{}'>{}</p><p class='k-remedy'>{}</p>").format(tone, reason, status.remedy)


def _bar(seen: Seen, tone: str) -> str:
    status = seen.status
    share = min(status.step / status.of, 1.0) if status.of else 0.0
    return Markup("<div class='k-bar k-{}'><i style='width:{}%'></i></div>").format(tone, f"{100 * share:.1f}")


def _facts(panel: Panel, seen: Seen, speed: Pace) -> str:
    status, record = seen.status, seen.run.record
    rate = "" if speed.tokens_per_second is None else f"{speed.tokens_per_second:,.0f}"
    facts = [
        ("step", f"{status.step:,} of {status.of:,}" if status.of else ""),
        ("a step", _rate(speed.seconds_per_step).removesuffix(" a step")),
        ("tokens a second", rate),
        ("time left in this phase", duration(speed.seconds_left)),
        ("started", moment(status.started)),
        ("took", duration(status.seconds) if status.state in ENDED and status.started else ""),
        ("result", panel.history.outcome(seen).words() if status.state in ENDED else ""),
        ("attempt", str(status.attempt) if status.attempt > 1 else ""),
        ("dataset", record.dataset or ""),
        ("builds on", record.parent or ""),
    ]
    return Markup("{}{}").format(described(facts), _compared(panel.home, seen))


def _compared(home: Home, seen: Seen) -> str:
    """What was predicted beside what came."""
    try:
        lines = [line for line in prediction.compared(seen.run) if line.predicted]
    except KatherineError:
        return Markup("")  # its result is damaged, which the run's own line says
    if not lines:
        return Markup("")
    rows = Markup("").join(
        Markup("<tr><th>{}</th><td>{}</td><td>{}</td></tr>").format(line.what, line.predicted, line.actual)
        for line in lines
    )
    return Markup("<table class='k-compared'><tr><th></th><th>predicted</th><th>actual</th></tr>{}</table>").format(
        rows
    )


def _nothing(picked: bool) -> str:
    if picked:
        return Markup("<p class='k-empty'>That run is gone. Choose another.</p>")
    return Markup("<p class='k-empty'>No run yet. What you start is shown here: its steps, its curves, its log.</p>")


def _log_link(run: Seen | None) -> str:
    if run is None or not files.log_parts(run.run):
        return Markup("<p class='k-empty'>No log yet.</p>")
    # As often as the link is made: a smaller figure would be an old one.
    whole = logs.size(run.run) // 1_000_000
    return Markup("<p>Log, its last {} lines. <a href='{}' download>Download all{}</a></p>").format(
        LOG_LINES, files.address(run.id, files.LOG), f", {whole} MB" if whole else ""
    )


def _page() -> HTML:
    """Words on the page. Gradio's own style for them would colour every letter alike."""
    return HTML("", apply_default_css=False, js_on_load=None)
