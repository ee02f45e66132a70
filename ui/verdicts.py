"""The tab on what reviewers said: who they prefer, whether they agree, the worst answers first; and below it the next
round, where their verdicts become pairs of another dataset. What verdicts amount to is katherine.judgement's, the pairs
are katherine.feedback's, the work is an errand's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from jobs import errands
from jobs.errands import Errand
from katherine import drafts, feedback, judgement, reviews, shelf
from katherine.errors import DataError, KatherineError, NotFound
from katherine.examples import Message
from katherine.feedback import Candidate, Collected
from katherine.history import Seen
from katherine.judgement import Bad, Judgement, Standing
from katherine.runs import ENDED, State
from katherine.units import moment
from ui import tones
from ui.component import Choice
from ui.edge import shown
from ui.held import held
from ui.panel import Live, Panel
from ui.table import Cell, Table
from ui.told import Told

TITLE = "Review"
WHO = "operator"
# Seconds between two looks while the tab is open: a reviewer's verdict takes a minute.
EVERY = 3.0
# Characters of a text in a table's cell: two lines on a wide screen. The whole is at the pointer, and in the card.
SHOWN = 120
THIS, ALL = "this export", "every export"
_HOW = {
    "rewrite": "rewritten",
    "disliked": "preferred to a disliked one",
    "liked": "liked, against a disliked one",
    "preferred": "preferred",
}


@dataclass(frozen=True, slots=True)
class _Asked:
    """What comes with every call: what is chosen on the page, and what it was sent."""

    export: str | None
    bad: str
    pair: str
    scope: str
    onto: str | None
    words: str
    name: str
    marks: dict[str, str] | None


class _Page:
    def __init__(self, panel: Panel):
        self.panel = panel
        self.home = panel.home
        self.export = Choice([], value=None, label="Export", elem_id="review-export")
        self.about = gr.HTML("")
        with gr.Column(visible=False) as self.said:
            gr.HTML("Who reviewed", elem_classes="k-section")
            self.people = Table(
                ("Who", "Judged#", "Questions of", "Recommends", "Note", "Last"),
                "Nobody yet.",
                elem_classes="kv-people",
            )
            gr.HTML("Preferred, by quant", elem_classes="k-section")
            self.standings = gr.HTML("")
            gr.HTML("Worst answers first", elem_classes="k-section")
            self.worst = Table(
                ("Quant", "Disliked#", "None good#", "Question", "Answer", "Rules broken", "Notes"),
                "Nobody minded an answer.",
                selects=True,
                elem_classes=["kv-texts", "kv-worst"],
            )
            self.opened = gr.HTML("")
            gr.HTML("Notes", elem_classes="k-section")
            self.notes = Table(
                ("Who", "Quant", "Note", "Question", "Answer", "When"),
                "Nobody wrote a note.",
                elem_classes=["kv-texts", "kv-notes"],
            )
        gr.HTML("Next round", elem_classes="k-section")
        self.pairs_about = gr.HTML("")
        with gr.Column(visible=False) as self.round:
            with gr.Row(equal_height=True):
                self.scope = gr.Radio([THIS, ALL], value=THIS, label="Verdicts on", min_width=240)
                self.all_in = gr.Button("All in", size="sm", min_width=80, scale=0, elem_classes="kd-go")
                self.all_out = gr.Button("All out", size="sm", min_width=80, scale=0, elem_classes="kd-go")
            self.candidates = Table(
                ("In", "Question", "Chosen", "Rejected", "How", "Who", ""),
                "No pair follows from these verdicts.",
                selects=True,
                elem_classes=["kv-texts", "kv-pairs"],
            )
            with gr.Column(visible=False, elem_classes="kv-looked") as self.looked:
                self.card = gr.HTML("")
                self.words = gr.Textbox(label="Chosen answer, as it goes in", lines=2, max_lines=12)
                with gr.Row():
                    self.toggle = gr.Button("", size="sm", min_width=130, scale=0)
                    self.given = gr.Button("As it was given", size="sm", min_width=130, scale=0, visible=False)
            with gr.Row(equal_height=True):
                self.onto = Choice([], value=None, label="Add to the pairs of", min_width=220)
                self.name = gr.Textbox(label="Name of the new dataset", max_lines=1, max_length=64, min_width=180)
                self.make = gr.Button(
                    "Make the new dataset", variant="primary", min_width=220, elem_classes=["kd-go", "kv-make"]
                )
            gr.HTML(
                Markup('<p class="k-dim k-note">{}</p>').format(
                    "The dataset that you choose stays as it is: all of it goes into the new one, with the pairs that "
                    "are in. Each keeps where it came from."
                )
            )
        with gr.Row(equal_height=True):
            self.progress = gr.HTML("", elem_classes="k-under-way")
            self.stop = gr.Button("Stop", size="sm", variant="stop", min_width=90, scale=0, visible=False)
            self.use = gr.Button(
                "Use it for the next run", size="sm", variant="primary", min_width=190, scale=0, visible=False
            )
        self.bad = held("")
        self.pair = held("")
        self.marks = held({})

    @property
    def inputs(self) -> list[Any]:
        return [self.export, self.bad, self.pair, self.scope, self.onto, self.words, self.name, self.marks]

    @property
    def outputs(self) -> list[Any]:
        return [
            self.export, self.about, self.said, self.people, self.standings, self.worst, self.opened, self.notes,
            self.pairs_about, self.round, self.candidates, self.looked, self.card, self.words, self.toggle, self.given,
            self.onto, self.name, self.make, self.progress, self.stop, self.use, self.bad, self.pair, self.marks,
        ]  # fmt: skip

    # ------------------------------------------------------------------------------------------------ handlers

    def refresh(self, *given: Any) -> Any:
        return self._news(_Asked(*given)) or gr.skip()

    def open_bad(
        self, export: str | None, bad: str, pair: str, scope: str, onto: str | None, words: str, name: str,
        marks: dict[str, str] | None, event: gr.EventData,
    ) -> Any:  # fmt: skip
        asked = _Asked(export, str(event.id), pair, scope, onto, words, name, marks)
        return self._news(asked) | {self.bad: asked.bad}

    def open_pair(
        self, export: str | None, bad: str, pair: str, scope: str, onto: str | None, words: str, name: str,
        marks: dict[str, str] | None, event: gr.EventData,
    ) -> Any:  # fmt: skip
        asked = _Asked(export, bad, str(event.id), scope, onto, words, name, marks)
        self._candidate(asked)
        return self._news(asked) | {self.pair: asked.pair}

    def toggled(self, *given: Any) -> Any:
        asked = _Asked(*given)
        one = self._candidate(asked)
        feedback.include(self.home, [one.id], not one.included)
        return self._news(asked) or gr.skip()

    def include_all(self, included: bool) -> Any:
        def handler(*given: Any) -> Any:
            asked = _Asked(*given)
            found = self._survey(asked).pairs
            # Of two that say the opposite, neither is meant by "all".
            feedback.include(self.home, [one.id for one in found if not (included and one.opposed)], included)
            return self._news(asked) or gr.skip()

        return handler

    def reworded(self, *given: Any) -> Any:
        asked = _Asked(*given)
        self._keep_words(asked)
        return self._news(asked) or gr.skip()

    def as_given(self, *given: Any) -> Any:
        asked = _Asked(*given)
        feedback.reword(self.home, self._candidate(asked), "")
        return self._news(asked) or gr.skip()

    def begin(self, *given: Any) -> Any:
        asked = _Asked(*given)
        if not asked.onto:
            raise NotFound("There is no dataset to add to. Prepare one in the Dataset tab.")
        self._keep_words(asked)
        chosen = [one for one in self._survey(asked).pairs if one.included]
        request = feedback.request(self.home, asked.onto, feedback.write(self.home, chosen), asked.name or "")
        errands.start(self.home, "prepare", request, WHO)
        return self._news(asked) or gr.skip()

    def end(self, *given: Any) -> Any:
        newest = self._newest()
        if newest is not None:
            errands.stop(self.home, newest.id)
        return self._news(_Asked(*given)) or gr.skip()

    def use_it(self, *given: Any) -> Any:
        newest = self._newest()
        if newest is None:
            raise NotFound("No dataset was made here yet.")
        drafts.change(self.home, dataset=shelf.summary(self.home, newest.result()["dataset"]).id)
        return self._news(_Asked(*given)) or gr.skip()

    # ------------------------------------------------------------------------------------------------ what is asked

    def _keep_words(self, asked: _Asked) -> None:
        """What stands in the field, for the pair that is open."""
        if asked.pair and (asked.words or "").strip():
            one = self._candidate(asked)
            if asked.words.strip() != one.chosen:
                feedback.reword(self.home, one, asked.words)

    def _candidate(self, asked: _Asked) -> Candidate:
        for one in self._survey(asked).pairs:
            if one.id == asked.pair:
                return one
        raise NotFound("This pair is not there any more: its verdict was changed. Choose another.")

    def _survey(self, asked: _Asked) -> Collected:
        exports = self._exports()
        at = self._chosen(asked, exports)
        ids = [seen.id for seen in exports] if asked.scope == ALL else [at.id] if at else []
        return feedback.survey(self.home, ids, self._target(asked, at))

    def _exports(self) -> list[Seen]:
        """Those that finished, newest first."""
        return [
            seen
            for seen in self.panel.history.runs()
            if seen.kind == "export" and (seen.status.state is State.succeeded or reviews.verdicts(self.home, seen.id))
        ]

    def _chosen(self, asked: _Asked, exports: Sequence[Seen]) -> Seen | None:
        """The one that is asked for, else the newest that somebody judged, else the newest."""
        by_id = {seen.id: seen for seen in exports}
        judged = (seen for seen in exports if reviews.verdicts(self.home, seen.id))
        return by_id.get(asked.export or "") or next(judged, None) or next(iter(exports), None)

    def _target(self, asked: _Asked, at: Seen | None) -> str:
        """The dataset that is chosen, else the export's own, else the newest."""
        there = [one.id for one in shelf.everyone(self.home)]
        own = feedback.own_dataset(self.home, at.id) if at else ""
        return next((each for each in (asked.onto, own, *there) if each in there), "") or ""

    def _newest(self) -> Errand | None:
        """The newest errand that adds pairs to a dataset."""
        for errand in errands.everyone(self.home):
            if errand.kind == "prepare" and "also" in errand.request:
                return errand
        return None

    # ------------------------------------------------------------------------------------------------ parts

    def _news(self, asked: _Asked) -> dict[Any, Any]:
        """Component → value, of those that are not what they were."""
        told = Told(asked.marks)
        exports = self._exports()
        at = self._chosen(asked, exports)
        options = [(_option(seen, len(reviews.verdicts(self.home, seen.id))), seen.id) for seen in exports]
        told.tell(
            "export",
            self.export,
            [options, at.id if at else None],
            lambda: gr.update(choices=options, value=at.id if at else None, visible=bool(options)),
        )
        found = None
        if at is not None:
            runs = [seen.run for seen in self.panel.history.runs()]
            found = judgement.of_export(self.home, at.id, runs)
        told.say("about", self.about, _about(at, found))
        told.visible("said", self.said, bool(found and found.reviewers))
        if found and found.reviewers:
            self._judged(told, found, asked)
        self._next_round(told, asked, at, bool(found and found.verdicts))
        self._follow(told)
        return told.values | {self.marks: told.marks} if told.values else {}

    def _judged(self, told: Told, found: Judgement, asked: _Asked) -> None:
        people = [_person(one) for one in found.reviewers]
        told.tell("people", self.people, people, lambda: self.people.rows(people))
        told.say("standings", self.standings, _standings(found))
        worst = [_bad(bad) for bad in found.worst]
        ids = [bad.id for bad in found.worst]
        told.tell(
            "worst", self.worst, [worst, asked.bad], lambda: self.worst.rows(worst, ids, selected=asked.bad or None)
        )
        opened = next((bad for bad in found.worst if bad.id == asked.bad), None)
        told.say("opened", self.opened, _conversation(opened) if opened else Markup())
        notes = [
            [note.reviewer, note.quant, note.text, _text(note.question), _text(note.answer), _when(note.time)]
            for note in found.notes
        ]
        told.tell("notes", self.notes, notes, lambda: self.notes.rows(notes))

    def _next_round(self, told: Told, asked: _Asked, at: Seen | None, any_verdict: bool) -> None:
        onto = self._target(asked, at)
        survey = self._survey(asked)
        told.say("pairs about", self.pairs_about, _pairs_about(survey, any_verdict))
        told.visible("round", self.round, any_verdict or bool(survey.pairs))
        rows = [_pair(one) for one in survey.pairs]
        ids = [one.id for one in survey.pairs]
        told.tell(
            "candidates", self.candidates, [rows, asked.pair],
            lambda: self.candidates.rows(rows, ids, selected=asked.pair or None),
        )  # fmt: skip
        one = next((one for one in survey.pairs if one.id == asked.pair), None)
        told.visible("looked", self.looked, one is not None)
        if one is not None:
            opposed = next((other for other in survey.pairs if other.id == one.opposed), None)
            told.say("card", self.card, _card(one, opposed))
            told.tell("words", self.words, [one.id, one.chosen], lambda: one.chosen)
            label = "Leave it out" if one.included else "Put it in"
            told.tell("toggle", self.toggle, label, lambda: gr.update(value=label))
            told.visible("given", self.given, bool(one.given))
        datasets = [
            (f"{each.id} · {each.report['dpo']['used']:,} pairs", each.id) for each in shelf.everyone(self.home)
        ]
        told.tell("onto", self.onto, [datasets, onto], lambda: gr.update(choices=datasets, value=onto or None))
        name = feedback.next_name(self.home, onto) if onto else ""
        told.tell("name", self.name, name, lambda: gr.update(placeholder=name))
        chosen = sum(one.included for one in survey.pairs)
        label = f"Make the new dataset with {_count(chosen, 'pair')}"
        told.tell(
            "make", self.make, [label, chosen, onto],
            lambda: gr.update(value=label if chosen else "Make the new dataset", interactive=bool(chosen and onto)),
        )  # fmt: skip

    def _follow(self, told: Told) -> None:
        errand = self._newest()
        text, running, made = Markup(), False, ""
        if errand is not None:
            text, running, made = self._errand(errand)
        told.say("progress", self.progress, text)
        told.visible("stop", self.stop, running)
        told.visible("use", self.use, bool(made) and drafts.load(self.home).dataset != made)

    def _errand(self, errand: Errand) -> tuple[Markup, bool, str]:
        """What there is to say of it, whether it is under way, and the dataset that came, if it is still there."""
        try:
            status = errand.status()
        except DataError as error:
            return Markup('<p class="k-bad">{}</p>').format(str(error)), False, ""
        tone = tones.of(status.state)
        if status.state not in ENDED:
            share = min(1.0, status.step / status.of) if status.of else 0.0
            line = Markup(
                '<p><span class="k-tone k-{}">making the dataset</span>: {}</p>'
                '<progress max="1" value="{:.3f}"></progress>'
            )
            return line.format(tone, status.phase, share), True, ""
        if status.state is not State.succeeded:
            said = f"{status.reason} {status.remedy}".strip()
            return Markup('<p><span class="k-tone k-{}">{}</span> {}</p>').format(tone, status.state, said), False, ""
        made = errand.result()["dataset"]
        try:
            label = next((path.rpartition("/")[2] for path in errand.request["also"]), "")
            came = feedback.came_of(self.home, made, label)
        except KatherineError:
            return Markup('<p class="k-dim">Dataset {} was made and is gone.</p>').format(made), False, ""
        use = ""
        if drafts.load(self.home).dataset == made:
            use = " The next run uses it: look at it in the Dataset tab, start in Train."
        return (
            Markup(
                '<p><span class="k-tone k-{}">made</span> <b>{}</b>: {}.{} <span class="k-dim">{}</span></p>'
            ).format(tone, made, came, use, moment(status.ended)),
            False,
            made,
        )


# ---------------------------------------------------------------------------------------------------------- drawing


def _option(seen: Seen, verdicts: int) -> str:
    return f"{tones.short(seen.id)} · {_count(verdicts, 'verdict')} · {moment(seen.run.record.created)}"


def _about(at: Seen | None, found: Judgement | None) -> Markup:
    if at is None:
        return Markup('<p class="k-empty">{}</p>').format(
            "There is no export yet. Make one in the Export tab; then its quants can be reviewed."
        )
    if found is None or not found.reviewers:
        return Markup(
            '<p class="k-empty">Nobody has said anything about this export yet. Give your reviewer the address of this '
            'panel with <a href="/review/">/review/</a> behind it, and the reviewer\'s password: it was shown at the '
            "first start (KATHERINE_REVIEWER_PASSWORD sets one, <code>app.py serve --new-passwords</code> makes new "
            "ones). What they say arrives here by itself.</p>"
        )
    goes = [one.recommendation for one in found.reviewers if one.recommendation]
    good = sum(one.good for one in goes)
    words = f"{_count(found.verdicts, 'verdict')} by {_count(len(found.reviewers), 'person', 'people')}. "
    words += f"{good} of {len(goes)} who recommend say that it is good to go." if goes else "Nobody recommends it yet."
    tone = "dim" if not goes else "good" if good == len(goes) else "bad" if not good else "warn"
    return Markup('<p class="kv-about"><span class="k-tone k-{}">{}</span></p>').format(tone, words)


def _person(one: judgement.Reviewer) -> list[Any]:
    sets = [f"{name}: {count}" for name, count in one.sets.items()] + ([f"their own: {one.free}"] if one.free else [])
    word = one.recommendation
    cell = Cell("not yet said", tone="dim")
    if word is not None:
        quant = word.column.rpartition(":")[2]
        said = "good to go" if word.good else "not good yet"
        cell = Cell(f"{said}, with {quant}" if quant else said, tone="good" if word.good else "bad")
    name = f"{one.name} (operator)" if one.role == "operator" else one.name
    return [name, one.judged, ", ".join(sets), cell, word.note if word else "", _when(one.last)]


def _standings(found: Judgement) -> Markup:
    rows = Markup().join(_standing(one) for one in found.standings)
    about = "The band is the 95% interval of how often the quant is preferred, the stroke in it the share so far, the "
    about += (
        "mark across it what chance alone would give. Each verdict counts as one; quants that said the same share it."
    )
    return Markup('<div class="kv-standings">{}</div><p class="k-dim k-note">{}</p><p>{}</p><p>{}</p>').format(
        rows, about, found.position.words(), found.agreement.words()
    )


def _standing(one: Standing) -> Markup:
    counts = [
        (one.ties, "ties", "tie"), (one.none_good, "times none was good", "time none was good"),
        (one.up, "liked", "liked"), (one.down, "disliked", "disliked"), (one.rewritten, "rewritten", "rewritten"),
    ]  # fmt: skip
    said = ", ".join(f"{count} {many if count != 1 else name}" for count, many, name in counts if count)
    track = Markup()
    if one.compared:
        track = Markup(
            '<i class="kv-band" style="left:{:.1f}%;width:{:.1f}%"></i><i class="kv-at" style="left:{:.1f}%"></i>'
            '<i class="kv-chance" style="left:{:.1f}%"></i>'
        ).format(
            100 * one.low, 100 * (one.high - one.low), 100 * one.preferred / one.compared,
            100 * one.expected / one.compared,
        )  # fmt: skip
    tone = {1: "good", -1: "bad", 0: "dim"}[one.leans]
    return Markup(
        '<div><b>{}</b><span class="kv-track">{}</span><span><span class="k-{}">{}</span>'
        '<br><span class="k-dim">{}</span></span></div>'
    ).format(one.quant, track, tone, one.words(), said)


def _bad(bad: Bad) -> list[Any]:
    notes = " / ".join(note.text for note in bad.notes)
    return [
        bad.judged.quant,
        Cell(str(len(bad.down)), sort=len(bad.down), tone="bad") if bad.down else 0,
        len(bad.none_good),
        _text(bad.verdict.question),
        _text(bad.judged.text),
        _text("; ".join(bad.broken)),
        _text(notes),
    ]


def _conversation(bad: Bad) -> Markup:
    """All that was said: the talk up to the question, and every quant's answer to it."""
    verdict = bad.verdict
    best = {verdict.preferred: "preferred"} if verdict.preferred else {}
    answers = Markup().join(
        Markup('<div class="kv-answer{}"><b class="kv-name">{}</b><div class="kv-text">{}</div>{}</div>').format(
            " kv-this" if judged.column == bad.judged.column else "",
            " · ".join(filter(None, (judged.quant, best.get(judged.column, ""), _thumb(judged.thumb)))),
            judged.text,
            Markup().join(
                Markup('<p><span class="k-dim">{}</span> {}</p>').format(f"{verdict.reviewer} {what}", text)
                for what, text in (("notes", judged.note), ("would say", judged.rewrite))
                if text
            ),
        )
        for judged in verdict.answers
    )
    others = [note for note in bad.notes if note.verdict != verdict.id]
    more = Markup().join(
        Markup('<p><span class="k-dim">{} notes</span> {}</p>').format(note.reviewer, note.text) for note in others
    )
    minded = [
        f"{what} by {', '.join(who)}"
        for what, who in (("disliked", bad.down), ("liked", bad.up), ("none good", bad.none_good))
        if who
    ]
    more += Markup("<p>{}: {}</p>").format(bad.judged.quant, "; ".join(minded)) if minded else Markup()
    said = "a tie" if verdict.tie else "none is good" if verdict.none_good else ""
    return Markup('<div class="kv-card"><p class="k-dim">{}</p>{}<div class="kv-answers">{}</div>{}{}</div>').format(
        ", ".join(
            filter(None, (verdict.reviewer, moment(verdict.time), verdict.source or "a question of their own", said))
        ),
        _turns(bad.judged.before),
        answers,
        more,
        Markup('<p class="k-bad">Breaks: {}</p>').format("; ".join(bad.broken)) if bad.broken else Markup(),
    )


def _thumb(thumb: int) -> str:
    return {-1: "disliked", 1: "liked"}.get(thumb, "")


def _turns(turns: Sequence[Message]) -> Markup:
    names = {"system": "System", "user": "Asked", "assistant": "Answered"}
    return Markup().join(
        Markup('<div class="kv-turn"><b>{}</b><div class="kv-text">{}</div></div>').format(
            names[turn.role], turn.content
        )
        for turn in turns
    )


def _pairs_about(survey: Collected, any_verdict: bool) -> Markup:
    if not any_verdict and not survey.pairs:
        return Markup('<p class="k-empty">{}</p>').format(
            "Verdicts become training data here: an answer that is preferred to another, or rewritten, makes a pair "
            "for the next round of DPO. There are none yet."
        )
    included = sum(one.included for one in survey.pairs)
    rewrites = sum(one.how == "rewrite" for one in survey.pairs)
    words = f"{_count(len(survey.pairs), 'pair')} from these verdicts, {rewrites} of them rewritten by a reviewer. "
    words += f"{included} go in." if survey.pairs else ""
    said = Markup("<p>{}</p>").format(words)
    if opposed := sum(bool(one.opposed) for one in survey.pairs):
        said += Markup('<p class="k-warn">{}</p>').format(
            f"{opposed} say the opposite of each other: reviewers disagree. Neither goes in until you put one in."
        )
    if survey.left_out:
        reasons = Markup().join(
            Markup("<li>{}: {}</li>").format(_count(count, "answer"), reason)
            for reason, count in survey.left_out.items()
        )
        said += Markup(
            '<details class="k-sums"><summary>{} gave no pair</summary><ul>{}</ul></details>'
        ).format(_count(sum(survey.left_out.values()), "answer"), reasons)  # fmt: skip
    return said


def _pair(one: Candidate) -> list[Any]:
    state = ["opposed"] * bool(one.opposed) + ["reworded"] * bool(one.given) + [f"in {name}" for name in one.datasets]
    return [
        Cell("in", tone="good") if one.included else Cell("out", tone="warn" if one.opposed else "dim"),
        _text(one.question),
        _text(one.chosen),
        _text(one.rejected),
        _HOW[one.how],
        ", ".join(one.people),
        Cell(", ".join(state), tone="warn" if one.opposed else ""),
    ]


def _card(one: Candidate, opposed: Candidate | None) -> Markup:
    said = Markup().join(
        Markup("<li>{}</li>").format(
            ", ".join(
                filter(
                    None,
                    (
                        origin.reviewer,
                        moment(origin.time),
                        f"{origin.chosen} against {origin.rejected}"
                        if origin.chosen
                        else f"instead of {origin.rejected}",
                        tones.short(origin.export),
                        f"question {origin.source or 'of their own'}",
                        f"round {origin.round + 1}" if origin.round else "",
                        f"notes: {origin.note}" if origin.note else "",
                    ),
                )
            )
        )
        for origin in one.origins
    )
    against = Markup()
    if opposed is not None:
        against = Markup('<p class="k-warn">{} said the opposite.</p>').format(", ".join(opposed.people))
    return Markup(
        '<div class="kv-card">{}<div class="kv-answers">'
        '<div class="kv-answer kv-chosen"><b class="kv-name">Chosen{}</b><div class="kv-text">{}</div></div>'
        '<div class="kv-answer kv-rejected"><b class="kv-name">Rejected</b><div class="kv-text">{}</div></div>'
        '</div>{}<ul class="k-dim">{}</ul></div>'
    ).format(
        _turns(one.pair.prompt),
        ", as it was given" if one.given else "",
        one.given or one.chosen,
        one.rejected,
        against,
        said,
    )


def _text(text: str) -> Cell:
    line = " ".join(text.split())
    return Cell(line) if len(line) <= SHOWN else Cell(f"{line[: SHOWN - 1]}…", whole=text)


def _when(time: str) -> Cell:
    return Cell(moment(time), sort=time)


def _count(count: int, noun: str, many: str = "") -> str:
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def build(panel: Panel) -> Live:
    page = _Page(panel)
    given: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    for event, handler in (
        (page.export.input, page.refresh),
        (page.worst.select, page.open_bad),
        (page.scope.input, page.refresh),
        (page.candidates.select, page.open_pair),
        (page.toggle.click, page.toggled),
        (page.all_in.click, page.include_all(True)),
        (page.all_out.click, page.include_all(False)),
        (page.words.blur, page.reworded),
        (page.given.click, page.as_given),
        (page.onto.input, page.refresh),
        (page.make.click, page.begin),
        (page.stop.click, page.end),
    ):
        event(shown(handler), page.inputs, page.outputs, **given)
    used = page.use.click(shown(page.use_it), page.inputs, page.outputs, **given)
    used.success(None, js="() => { katherine.openTab('recipe'); }")
    return Live(page.refresh, page.outputs, page.inputs, every=EVERY)
