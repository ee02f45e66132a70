"""The reviewer's page: what each version of the persona answered, side by side, without saying which is which. It has
no operator's handler in it."""

import hashlib
from collections.abc import Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from jobs import autostop
from katherine import outcomes, probes
from katherine.errors import NotFound
from katherine.examples import Message
from katherine.history import Seen
from katherine.probes import Answer
from katherine.runs import State
from katherine.units import moment
from ui.edge import shown
from ui.panel import Panel

_NOTHING = Markup('<p class="k-empty">There is nothing to read yet. Whoever runs the training will tell you when.</p>')


def build(panel: Panel) -> gr.Blocks:
    with gr.Blocks(title="Katherine: review", analytics_enabled=False) as page:
        gr.HTML(
            Markup(
                "<h1>What they answered</h1><p>Each question was put to every version, with nothing else said before. "
                "The letters change from question to question, so that no version has a favourite letter. "
                "Tell whoever asked you which answers sound right, and which do not.</p>"
            ),
            elem_classes="k-prose",
        )
        with gr.Row(visible=False) as ending:
            notice = gr.HTML(elem_classes="k-prose", min_width=260)
            keep = gr.Button("I am still reading", variant="primary", min_width=200)
        with gr.Row(visible=False) as choice:
            export = gr.Dropdown(label="From", interactive=True, filterable=False, min_width=240)
            question = gr.Dropdown(label="Question", interactive=True, filterable=False, min_width=300)
        answers = gr.HTML(_NOTHING, elem_classes="k-versions")
        with gr.Row(visible=False) as moving:
            back = gr.Button("Previous")
            forward = gr.Button("Next", variant="primary")

        def asked(run_id: str | None) -> list[Answer]:
            return _of_files(panel, run_id) if run_id else []

        def opened() -> dict[Any, Any]:
            found = [seen for seen in panel.history.runs() if seen.kind == "probe" and _readable(seen)]
            # The newest may have asked no file at all.
            while found and not (rows := asked(found[0].id)):
                del found[0]
            if not found:
                return {answers: _NOTHING, choice: gr.Row(visible=False), moving: gr.Row(visible=False)}
            labels = [(f"{moment(seen.run.record.created)}", seen.id) for seen in found]
            return {
                export: gr.Dropdown(choices=labels, value=found[0].id),
                question: _questions(rows),
                answers: _drawn(found[0].id, rows, rows[0].probe),
                choice: gr.Row(visible=True),
                moving: gr.Row(visible=True),
            }

        def another(run_id: str) -> dict[Any, Any]:
            rows = asked(run_id)
            if not rows:
                raise NotFound("Nobody recorded answers for this one. Choose another.")
            return {question: _questions(rows), answers: _drawn(run_id, rows, rows[0].probe)}

        def asked_for(run_id: str, probe: str) -> Markup:
            return _drawn(run_id, asked(run_id), probe)

        def step(by: int) -> Any:
            def move(run_id: str, probe: str) -> dict[Any, Any]:
                rows = asked(run_id)
                order = list(dict.fromkeys(row.probe for row in rows))
                if probe not in order:
                    return {}
                to = order[(order.index(probe) + by) % len(order)]
                return {question: to, answers: _drawn(run_id, rows, to)}

            return move

        def countdown() -> dict[Any, Any]:
            view = autostop.view(panel.home)
            words = Markup("<p>{}</p>").format(autostop.words(view)) if view.can_cancel else ""
            return {ending: gr.Row(visible=view.can_cancel), notice: words}

        def keep_on() -> dict[Any, Any]:
            autostop.cancel(panel.home, "the reviewer")
            return countdown()

        # A reviewer who reads is work that the queue does not know of.
        watch = gr.Timer(5)
        watch.tick(
            shown(countdown),
            outputs=[ending, notice],
            show_progress="hidden",
            queue=False,
            api_visibility="private",
        )
        given: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        keep.click(shown(keep_on), outputs=[ending, notice], **given)
        page.load(shown(countdown), outputs=[ending, notice], **given)
        page.load(shown(opened), outputs=[export, question, answers, choice, moving], **given)
        export.input(shown(another), export, [question, answers], **given)
        question.input(shown(asked_for), [export, question], answers, **given)
        for button, by in ((back, -1), (forward, 1)):
            button.click(shown(step(by)), [export, question], [question, answers], **given)
    page.queue(default_concurrency_limit=8)
    return page


def _readable(seen: Seen) -> bool:
    """Whether it recorded anything: a file of nothing is as good as none."""
    answers = seen.run.out / "answers.jsonl"
    return seen.status.state is State.succeeded and answers.is_file() and answers.stat().st_size > 0


def _of_files(panel: Panel, run_id: str) -> list[Answer]:
    """What exported files answered: the base and the adapters were asked too, and are not to be judged. A page may name
    any run; only answers are ever read."""
    seen = panel.history.get(run_id)
    if seen.kind != "probe" or not _readable(seen):
        return []
    return [row for row in probes.answers(seen.run.out) if outcomes.is_file(row.model)]


def _questions(rows: Sequence[Answer]) -> gr.Dropdown:
    named = {row.probe: row.talk[-2].content for row in rows}
    labels = [(text if len(text) <= 70 else f"{text[:69]}…", probe) for probe, text in named.items()]
    return gr.Dropdown(choices=labels, value=labels[0][1])


def _drawn(run_id: str, rows: Sequence[Answer], probe: str) -> Markup:
    """The talk up to the last question once, then each version's answer to it under a letter."""
    here = [row for row in rows if row.probe == probe]
    if not here:
        return _NOTHING

    def shuffled(row: Answer) -> bytes:
        return hashlib.sha256(f"{run_id}\0{probe}\0{row.model}".encode()).digest()

    # What was said before is shown once where it is the same for all: in a longer talk each has answers of its own.
    shared = here[0].talk[:-1] if all(row.talk[:-1] == here[0].talk[:-1] for row in here) else ()
    cards = [
        Markup('<section class="k-card"><h2>Version {}</h2>{}</section>').format(letter, _said(row.talk[len(shared) :]))
        for letter, row in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", sorted(here, key=shuffled), strict=False)
    ]
    return Markup('<div class="k-before">{}</div><div class="k-cards">{}</div>').format(
        _said(shared), Markup("").join(cards)
    )


def _said(talk: Sequence[Message]) -> Markup:
    turn = Markup('<p class="k-said-{}">{}</p>')
    return Markup("").join(turn.format(message.role, message.content) for message in talk)
