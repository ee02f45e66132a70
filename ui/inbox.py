"""The upper part of the dataset tab: files come in, are chosen, and become a dataset. What waits is katherine.inbox's,
the work is jobs.errands'."""

from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from gradio.components import Component
from markupsafe import Markup

from jobs import errands
from jobs.errands import Errand
from katherine import hub, inbox, recipe
from katherine.errors import DataError, KatherineError
from katherine.runs import ENDED, State, Status
from katherine.settings import Home
from katherine.units import moment, size
from ui import tones
from ui.edge import shown
from ui.panel import Panel
from ui.told import Told

# What a proxy lets through in one request, less what surrounds the files in it.
UPLOAD_MB = 95
# Ended errands that are still shown: what happened just now, and what it was compared with.
SHOWN_ENDED = 3
# The errands that are shown here.
KINDS = ("prepare", "fetch")
_STEPS = {"read": "MB read", "count": "examples", "download": "MB"}


class Inbox:
    """The components, and what they do."""

    def __init__(self, panel: Panel, seen: gr.HTML, memory: gr.BrowserState):
        """seen: what the page was sent last, as Told marks it. memory: the browser's own: `waiting` in it is the errand
        whose dataset is to be shown when it is there."""
        self.home = panel.home
        self.seen = seen
        self.memory = memory
        default = recipe.SftRecipe.model_fields
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                self.drop = gr.File(
                    file_count="multiple",
                    label=f"Drop .jsonl files here, up to {UPLOAD_MB} MB at once",
                    height=132,
                    elem_classes="kd-drop",
                )
                with gr.Row(elem_classes="kd-fetch"):
                    self.path = gr.Textbox(
                        label="Or fetch from Hugging Face",
                        placeholder="owner/name, buckets/owner/name/folder, hf://datasets/…",
                        max_lines=1,
                        scale=4,
                        min_width=200,
                    )
                    self.fetch = gr.Button("Fetch", scale=1, min_width=80)
                gr.HTML(
                    Markup(
                        "<p class='k-dim kd-note'>Larger files: put them into <code>{}</code> by any way.</p>"
                    ).format(self.home.inbox)
                )
            with gr.Column(min_width=300):
                self.choice = offered(gr.CheckboxGroup(label="Files in the inbox", choices=[], elem_classes="kd-files"))
                self.nothing = gr.HTML(elem_classes="kd-note")
                self.refused = gr.HTML(elem_classes="kd-note")
                with gr.Row(visible=False) as self.acts:
                    self.all = gr.Button("All", size="sm", min_width=60)
                    self.none = gr.Button("None", size="sm", min_width=60)
                    self.delete = gr.Button("Delete chosen…", size="sm", min_width=120)
                    self.sure = gr.Button("Delete for good", size="sm", variant="stop", min_width=120, visible=False)
                    self.keep = gr.Button("Keep", size="sm", min_width=60, visible=False)
        with gr.Row(equal_height=True):
            self.name = gr.Textbox(label="Name", placeholder="dataset", max_lines=1, min_width=140, max_length=64)
            self.base = gr.Textbox(
                label="Count tokens as this base does", value=default["base"].default, max_lines=1, min_width=200
            )
            self.max_length = gr.Number(
                label="Max length, tokens", value=default["max_length"].default, precision=0, minimum=1, min_width=120
            )
            self.uncurated = gr.Radio(
                label="Pairs without _cat and _type", choices=[("leave out", False), ("use", True)], value=False,
                min_width=180,
            )  # fmt: skip
            self.prepare = gr.Button("Prepare a dataset", variant="primary", min_width=180, elem_classes="kd-go")
        with gr.Row():
            self.errands = gr.HTML(elem_classes="kd-errands")
            self.stop = gr.Button("Stop", size="sm", min_width=80, scale=0, visible=False)

        self._wire()

    @property
    def outputs(self) -> list[Any]:
        return [self.choice, self.nothing, self.acts, self.errands, self.stop]

    def _wire(self) -> None:
        given: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        seen, memory = self.seen, self.memory
        listed, begun = [self.choice, self.nothing, self.acts, seen], [self.errands, self.stop, seen]
        self.drop.upload(
            shown(self.receive), [self.drop, self.choice, seen], [self.drop, self.refused, *listed], **given
        )
        for event in (self.fetch.click, self.path.submit):
            event(shown(self.begin_fetch), [self.path, seen], [self.path, *begun], **given)
        self.all.click(shown(lambda: self.choose(True)), None, [self.choice], **given)
        self.none.click(shown(lambda: self.choose(False)), None, [self.choice], **given)
        asking = [self.delete, self.sure, self.keep]
        self.delete.click(shown(self.ask), [self.choice], asking, **given)
        self.keep.click(shown(lambda: self._asking(False)), None, asking, **given)
        self.sure.click(shown(self.remove), [self.choice, seen], [*asking, *listed], **given)
        asked = [self.choice, self.name, self.base, self.max_length, self.uncurated, memory, seen]
        self.prepare.click(shown(self.begin_prepare), asked, [memory, *begun], **given)
        self.stop.click(shown(self.stop_newest), [seen], begun, **given)

    def refresh(self, told: Told, chosen: list[str]) -> dict[Any, Any]:
        """What has changed in the inbox and among the errands."""
        return self._listing(told, chosen) | self._errands(told)

    # ------------------------------------------------------------------------------------------ the inbox's files

    def _listing(self, told: Told, chosen: list[str], add: list[str] | None = None) -> dict[Any, Any]:
        files = inbox.files(self.home)
        mark = [[file.name, file.size, file.modified] for file in files]
        first = "inbox" not in told.marks
        if not told.is_news("inbox", mark) and add is None:
            return {}
        readable = [file for file in files if file.readable]
        if first and readable:
            # What came last is what is meant, until somebody chooses.
            newest = readable[0].name.rpartition("/")[0]
            chosen = [file.name for file in readable if file.name.rpartition("/")[0] == newest]
        names = {file.name for file in readable}
        kept = [name for name in [*chosen, *(add or [])] if name in names]
        labels = [(f"{file.name} · {size(file.size)} · {moment(file.modified)}", file.name) for file in readable]
        total = sum(file.size for file in readable)
        label = f"Files in the inbox: {len(readable)}, {size(total)}" if readable else "Files in the inbox"
        choice: dict[str, Any] = {"choices": labels, "label": label, "visible": bool(readable)}
        # What is ticked is sent only where it has to change: this answer may be overtaken by that of an upload.
        if first or add is not None or kept != chosen:
            choice["value"] = kept
        return {
            self.choice: gr.CheckboxGroup(**choice),
            self.acts: gr.Row(visible=bool(readable)),
            self.nothing: self._left([file.name for file in files if not file.readable], bool(readable)),
        }

    def _left(self, unreadable: list[str], some: bool) -> Markup:
        text = Markup("")
        if not some:
            text += Markup("<p class='k-empty'>The inbox is empty. Drop files, fetch a dataset, or copy files in.</p>")
        if unreadable:
            more = f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
            text += Markup("<p class='k-warn'>Not read, since the name does not end in .jsonl: {}{}.</p>").format(
                ", ".join(unreadable[:5]), more
            )
        return text

    def receive(self, uploads: list[str] | None, chosen: list[str], seen: dict[str, Any]) -> dict[Any, Any]:
        received = inbox.receive(self.home, [Path(upload) for upload in uploads or []])
        told = Told(seen)
        changed = self._listing(told, chosen, received.kept)
        # Not gr.Warning: that comes through Gradio's queue, which a handler here does not take.
        said = Markup("").join(Markup("<p class='k-bad'>{}</p>").format(one) for one in received.refused[:8])
        return {self.drop: None, self.refused: said, self.seen: told.marks} | changed

    def choose(self, every: bool) -> list[str]:
        return [file.name for file in inbox.files(self.home) if file.readable and every]

    def ask(self, chosen: list[str]) -> dict[Any, Any]:
        if not chosen:
            raise DataError("No file is chosen. Tick those that are to go.")
        return self._asking(True, f"Delete {len(chosen)} for good")

    def _asking(self, asking: bool, label: str = "Delete for good") -> dict[Any, Any]:
        return {
            self.delete: gr.Button(visible=not asking),
            self.sure: gr.Button(label, visible=asking),
            self.keep: gr.Button(visible=asking),
        }

    def remove(self, chosen: list[str], seen: dict[str, Any]) -> dict[Any, Any]:
        inbox.remove(self.home, chosen)
        told = Told(seen)
        listed = self._listing(told, [], [])
        return self._asking(False) | {self.seen: told.marks} | listed

    # ------------------------------------------------------------------------------------------ errands

    def begin_fetch(self, path: str, seen: dict[str, Any]) -> dict[Any, Any]:
        hub.parse(path or "")
        errands.start(self.home, "fetch", {"path": path.strip()}, "panel")
        return {self.path: ""} | self._begun(seen)

    def begin_prepare(
        self,
        chosen: list[str],
        name: str,
        base: str,
        max_length: float | None,
        uncurated: bool,
        memory: dict[str, Any] | None,
        seen: dict[str, Any],
    ) -> dict[Any, Any]:
        if not chosen:
            raise DataError("No file is chosen. Tick those in the inbox that are to go in.")
        request = {
            "paths": [str(path) for path in inbox.find(self.home, chosen)],
            "include_uncurated": uncurated,
            "name": (name or "").strip() or None,
        }
        errand = prepare(self.home, request, base, max_length)
        return {self.memory: (memory or {}) | {"waiting": errand.id}} | self._begun(seen)

    def stop_newest(self, seen: dict[str, Any]) -> dict[Any, Any]:
        mine = [errand for errand in errands.under_way(self.home) if errand.kind in KINDS]
        for errand in mine[:1]:
            errands.stop(self.home, errand.id)
        return self._begun(seen)

    def _begun(self, seen: dict[str, Any]) -> dict[Any, Any]:
        told = Told(seen)
        changed = self._errands(told)
        return changed | {self.seen: told.marks}

    def _errands(self, told: Told) -> dict[Any, Any]:
        shown_ones, ended = [], 0
        for errand in errands.everyone(self.home):
            # The others are shown where they were asked for.
            if errand.kind not in KINDS:
                continue
            try:
                status = errand.status()
            except DataError as error:
                status = Status(State.failed, reason=str(error))
            ended += status.state in ENDED
            if ended > SHOWN_ENDED:
                break
            shown_ones.append((errand, status))
        running = [errand for errand, status in shown_ones if status.state not in ENDED]
        text = Markup("").join(_line(errand, status) for errand, status in shown_ones)
        if not told.is_news("errands", text):
            return {}
        return {
            self.errands: text,
            self.stop: gr.Button(f"Stop {_what(running[0])}" if running else "Stop", visible=bool(running)),
        }


C = TypeVar("C", bound=Component)


def offered(component: C) -> C:
    """A choice among what was offered later than the page was made. Gradio would refuse what it does not remember
    having offered, and it forgets when it is started again; what comes is looked up before it is used."""
    component.preprocess = lambda payload: payload  # type: ignore[method-assign]
    return component


def prepare(home: Home, request: dict[str, Any], base: str, max_length: float | None) -> Errand:
    """Starts the errand that makes a dataset. Raises DataError for a max length that is none."""
    if not max_length or max_length < 1:
        raise DataError("Max length is a number of tokens, at least 1.")
    default = recipe.SftRecipe.model_fields["base"].default
    return errands.start(
        home, "prepare", request | {"base": (base or "").strip() or default, "max_length": int(max_length)}, "panel"
    )


def _line(errand: Errand, status: Status) -> Markup:
    """One errand: what it is, where it is or how it ended."""
    if status.state in ENDED:
        where = f"{status.reason} {status.remedy}".strip() or _outcome(errand)
        when = moment(status.ended)
    else:
        steps = f", {status.step:,} of {status.of:,} {_STEPS.get(status.phase, '')}" if status.of else ""
        where, when = f"{status.phase}{steps}", ""
    share = min(1.0, status.step / status.of) if status.of and status.state not in ENDED else 0.0
    return Markup(
        "<div class='kd-errand'><span class='k-tone k-{}'>{}</span> <b>{}</b> {} <span class='k-dim'>{}</span>"
        "<div class='kd-bar'><i style='width:{:.1f}%'></i></div></div>"
    ).format(tones.of(status.state), status.state, _what(errand), where, when, share * 100)


def _what(errand: Errand) -> str:
    if errand.kind == "fetch":
        return f"fetch {errand.request.get('path', '')}"
    return f"prepare {errand.request.get('name') or 'dataset'}"


def _outcome(errand: Errand) -> str:
    try:
        result = errand.result()
    except KatherineError:
        return ""
    said = f"→ {result.get('dataset') or result.get('folder') or ''}"
    return f"{said}. {result['remark']}" if result.get("remark") else said
