"""The part of the publish tab from which an approved export is pushed: what would go where, the button, how far it is,
the receipts. What is sent, and whether it may be, is katherine.publish's; the push itself is an errand."""

from collections.abc import Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from jobs import errands
from jobs.errands import Errand
from katherine import publish, reviews, settings
from katherine.approval import Standing
from katherine.errors import ApprovalError, Busy, DataError, KatherineError, NotFound, SetupError
from katherine.publish import Item, Plan, Receipt
from katherine.runs import ENDED, State, Status
from katherine.settings import Home
from katherine.units import duration, moment, size
from ui import files, tones
from ui.approving import ended, under_way
from ui.runs import described
from ui.table import Cell, Table
from ui.told import Told

KIND = "push"
KINDS_OF_FILE = {"gguf": "model", "adapter": "adapter", "paper": "paper", "manifest": "manifest, last"}
NO_TOKEN = (
    f"{publish.TOKEN} is not set. Make a token that may write, on the hub's page of tokens, set {publish.TOKEN} to it "
    "where the panel is started, and start it anew."
)


class Pushing:
    """The components, and what they show. Handlers are the tab's."""

    def __init__(self) -> None:
        gr.HTML("Push", elem_classes="k-section")
        with gr.Row(equal_height=False):
            self.target = gr.Textbox(
                label="Private bucket on Hugging Face", placeholder="owner/name", max_lines=1, min_width=220,
                elem_id="push-target",
            )  # fmt: skip
            self.also = gr.Textbox(
                label="Also to a private model repository (may stay empty)", placeholder="owner/name", max_lines=1,
                min_width=220, elem_id="push-also",
            )  # fmt: skip
        self.plan = gr.HTML("", apply_default_css=False)
        self.files = Table(
            ("File in that folder", "What", "Size#"), "Nothing can be pushed yet.", elem_classes="k-plan", visible=False
        )
        self.push = gr.Button(
            "Push", variant="primary", interactive=False, size="sm", min_width=200, scale=0, elem_id="push"
        )
        self.why = gr.HTML("", apply_default_css=False)
        with gr.Row(equal_height=True):
            self.progress = gr.HTML("", elem_classes="k-under-way")
            self.stop = gr.Button("Stop the push", visible=False, variant="stop", size="sm", min_width=130, scale=0)
        gr.HTML("Receipts", elem_classes="k-section")
        self.receipts = Table(
            ("When", "By", "Bucket", "Files#", "Size#", "Sent#", "Took#"),
            "This export has not been pushed yet.",
            selects=True,
            elem_classes="k-lines",
        )
        self.receipt = gr.HTML("", apply_default_css=False)
        self.arrived = Table(
            ("Arrived", "Size#", "SHA-256", "Hub's hash", "By this push"), "", elem_classes="k-lines", visible=False
        )

    @property
    def outputs(self) -> list[Any]:
        return [
            self.target, self.also, self.plan, self.files, self.push, self.why, self.progress, self.stop, self.receipts,
            self.receipt, self.arrived,
        ]  # fmt: skip

    def show(
        self,
        told: Told,
        home: Home,
        export_id: str,
        standing: Standing | None,
        target: str | None,
        receipt_id: str,
        pushes: Sequence[tuple[Errand, Status]],
    ) -> None:
        """pushes: errands of KIND, of every export, newest first."""
        self._remember(told, target, pushes)
        plan, problem = _plan(home, export_id)
        told.say("plan", self.plan, _planned(plan) if plan else Markup('<p class="k-bad">{}</p>').format(problem))
        rows = [] if plan is None else [_item(plan, file) for file in plan.files]
        told.tell("plan files", self.files, rows, lambda: gr.update(value=self.files.rows(rows), visible=bool(rows)))
        going = next(((errand, status) for errand, status in pushes if status.state not in ENDED), None)
        valid = bool(standing and standing.valid)
        dead = _dead(valid, going)
        failed = next((status for errand, status in pushes if errand.request.get("export") == export_id), None)
        again = failed is not None and failed.state in (State.failed, State.cancelled, State.interrupted)
        label = ("Push again" if again else "Push") + (
            f" · {len(plan.files)} files, {size(plan.bytes)}" if plan else ""
        )
        can = not dead and plan is not None
        told.tell("push", self.push, [label, can], lambda: gr.update(value=label, interactive=can))
        told.say("why", self.why, Markup('<p class="k-dim">{}</p>').format(dead) if dead else Markup())
        told.say("pushing", self.progress, _progress(export_id, pushes, going))
        told.visible("stop pushing", self.stop, going is not None)
        self._receipts(told, home, export_id, receipt_id)

    def _remember(self, told: Told, target: str | None, pushes: Sequence[tuple[Errand, Status]]) -> None:
        """Where the last push went, so that the next needs no typing; once, before anything was typed."""
        if told.is_news("places", "filled") and not target and pushes:
            request = pushes[0][0].request
            told.values[self.target] = str(request.get("to") or "")
            told.values[self.also] = str(request.get("repo") or "")

    def _receipts(self, told: Told, home: Home, export_id: str, receipt_id: str) -> None:
        try:
            found = publish.receipts(home, export_id)
        except KatherineError as error:
            told.say("receipt", self.receipt, Markup('<p class="k-bad">{}</p>').format(str(error)))
            return
        rows = [
            [
                Cell(moment(each.time), sort=each.time),
                each.who,
                each.bucket + (f", {each.repository}" if each.repository else ""),
                Cell(str(len(each.files)), sort=len(each.files)),
                Cell(size(each.bytes), sort=each.bytes),
                Cell(size(each.sent) if each.sent else "nothing", sort=each.sent),
                Cell(duration(each.seconds), sort=each.seconds),
            ]
            for each in found
        ]
        ids = [each.id for each in found]
        chosen = next((each for each in found if each.id == receipt_id), found[0] if found else None)
        told.tell(
            "receipts",
            self.receipts,
            [export_id, rows, chosen.id if chosen else ""],
            lambda: self.receipts.rows(rows, ids, selected=chosen.id if chosen else None),
        )
        told.say("receipt", self.receipt, _receipt(chosen) if chosen else Markup())
        arrived = _arrived(chosen) if chosen else []
        told.tell(
            "arrived", self.arrived, arrived, lambda: gr.update(value=self.arrived.rows(arrived), visible=bool(arrived))
        )

    def begin(
        self, home: Home, export_id: str, target: str | None, also: str | None, who: str | None, role: str
    ) -> None:
        """Starts the errand that pushes. What is refused here, the errand refuses too: a page decides nothing."""
        name = reviews.name(who or "")
        target = (target or "").strip()
        if not target:
            raise DataError("Name the bucket: owner/name, such as my-name/persona. It is made, private, if need be.")
        plan = publish.plan(home, export_id)
        if not plan.approved:
            raise ApprovalError("\n".join(["This export is not approved as it is now.", *plan.reasons]))
        if settings.secret(publish.TOKEN) is None:
            raise SetupError(NO_TOKEN)
        request = {
            "export": export_id,
            "to": target,
            "who": name,
            "role": str(role),
        }
        if also := (also or "").strip():
            request["repo"] = also
        for errand in errands.under_way(home):
            if errand.kind == KIND and errand.request != request:
                raise Busy("Another push is under way. Wait for its end, or stop it.")
        errands.start(home, KIND, request, name)

    def end(self, home: Home, pushes: Sequence[tuple[Errand, Status]]) -> None:
        for errand, status in pushes:
            if status.state not in ENDED:
                errands.stop(home, errand.id)


def chosen(home: Home, export_id: str, receipt_id: str) -> str:
    """The id, where the export has such a receipt. Raises NotFound."""
    if receipt_id not in (each.id for each in publish.receipts(home, export_id)):
        raise NotFound(f"There is no receipt {receipt_id!r} of this export.")
    return receipt_id


def _plan(home: Home, export_id: str) -> tuple[Plan | None, str]:
    try:
        return publish.plan(home, export_id), ""
    except KatherineError as error:
        return None, str(error)


def _item(plan: Plan, file: Item) -> list[Any]:
    what = KINDS_OF_FILE.get(file.kind, file.kind)
    return [file.path, what, Cell(size(file.bytes), sort=file.bytes)]


def _planned(plan: Plan) -> Markup:
    """What would go where, in a line."""
    counts: dict[str, int] = {}
    for file in plan.files:
        counts[file.kind] = counts.get(file.kind, 0) + 1
    names = {
        "gguf": "GGUF file", "adapter": "file of the adapters", "paper": "paper (card, recipe, tables, approval)",
        "manifest": "manifest",
    }  # fmt: skip
    parts = [
        f"{count} {name.replace('file', 'files', 1).replace('paper', 'papers', 1) if count > 1 else name}"
        for kind, name in names.items()
        if (count := counts.get(kind))
    ]
    return Markup("<p>{}</p>").format(
        f"{', '.join(parts)}: {size(plan.bytes)}, into the folder {plan.folder} of the bucket. It is made private, and "
        "read back as private before the first byte; every file is compared there, and the manifest goes last."
    )


def _dead(valid: bool, going: tuple[Errand, Status] | None) -> str:
    """Why the button is dead, "" where it is not."""
    said = []
    if not valid:
        said.append("It can be pushed once the approval above is valid.")
    if settings.secret(publish.TOKEN) is None:
        said.append(NO_TOKEN)
    if going is not None:
        said.append("A push is under way.")
    return " ".join(said)


def _progress(export_id: str, pushes: Sequence[tuple[Errand, Status]], going: tuple[Errand, Status] | None) -> Markup:
    if going is not None:
        errand, status = going
        of = "" if errand.request.get("export") == export_id else f" {tones.short(str(errand.request.get('export')))}"
        return under_way(f"Pushing{of} to {errand.request.get('to', '')}", status)
    for errand, status in pushes:
        if errand.request.get("export") != export_id:
            continue
        if status.state is State.succeeded:
            return Markup(
                '<p><span class="k-tone k-good">Pushed</span> to {}, on {}. Every file was compared.</p>'
            ).format(str(errand.request.get("to", "")), moment(status.ended))
        return ended("Stopped" if status.state is State.cancelled else "Not pushed", status)
    return Markup()


def _receipt(receipt: Receipt) -> Markup:
    links = [_link(receipt.url, f"bucket {receipt.bucket}")]
    if receipt.repository:
        links.append(_link(receipt.repository_url, f"model repository {receipt.repository}"))
    links.append(
        Markup('<a href="{}" download>receipt.json</a>').format(
            files.export_address(receipt.export, f"pushes/{receipt.id}.json")
        )
    )
    facts = {
        "Pushed": f"{moment(receipt.time)} by {receipt.who} ({receipt.role})",
        "Approval": receipt.approval,
        "Folder": receipt.folder,
        "Bucket": "made by this push, private" if receipt.made else "private",
        "Commit": receipt.commit,
        "Also there, not of this push": ", ".join(receipt.others),
    }
    return described(facts.items()) + Markup('<div class="k-files">{}</div>').format(Markup(" ").join(links))


def _link(url: str, text: str) -> Markup:
    """The hub's page; text alone where the address is none of the web's."""
    if not url.startswith(("https://", "http://")):
        return Markup("<span>{}</span>").format(text)
    return Markup('<a href="{}" target="_blank" rel="noopener noreferrer">{}</a>').format(url, text)


def _arrived(receipt: Receipt) -> list[list[Any]]:
    return [
        [
            each.path.removeprefix(f"{receipt.folder}/"),
            Cell(size(each.bytes), sort=each.bytes),
            Cell(each.sha256[:12], whole=each.sha256),
            Cell(each.xet[:12], whole=each.xet),
            "sent" if each.now else "was there",
        ]
        for each in receipt.files
    ]
