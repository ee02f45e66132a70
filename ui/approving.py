"""The part of the publish tab in which an export is approved: what stands, what would be approved, giving it and taking
it back. What an approval is, and who may give one, is katherine.approval's; the reading is an errand's."""

from collections.abc import Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from jobs import errands
from jobs.errands import Errand
from katherine import approval, audit, reviews
from katherine.approval import Approval, Evidence, Offer, Standing
from katherine.errors import DataError, KatherineError
from katherine.runs import ENDED, State, Status
from katherine.settings import Home
from katherine.units import moment, size
from ui import files, tones
from ui.runs import described
from ui.told import Told

KINDS = ("approve", "verify")


class Approving:
    """The components, and what they show. Handlers are the tab's."""

    def __init__(self) -> None:
        gr.HTML("Approval", elem_classes="k-section")
        self.stands = gr.HTML("", elem_classes="k-stands", apply_default_css=False)
        with gr.Row(equal_height=True):
            self.check = gr.Button("Check the files", visible=False, size="sm", min_width=150, scale=0)
            self.withdraw = gr.Button("Withdraw …", visible=False, size="sm", min_width=120, scale=0)
        with gr.Column(visible=False, elem_classes="k-again") as self.asking:
            gr.HTML(
                "<p>Withdraw the approval? Nothing of this export can be pushed then. What is pushed stays there.</p>"
            )
            with gr.Row():
                self.sure = gr.Button("Withdraw it", variant="stop", size="sm", min_width=130, scale=0)
                self.leave = gr.Button("Leave it", size="sm", min_width=110, scale=0)
        with gr.Row(equal_height=False):
            self.who = gr.Textbox(
                label="Your name", max_lines=1, max_length=reviews.LONGEST_NAME, min_width=180, scale=1,
                html_attributes=gr.InputHTMLAttributes(autocomplete="name"), elem_id="publish-who",
            )  # fmt: skip
            self.note = gr.Textbox(
                label="Note, if there is something to say", max_lines=4, max_length=reviews.LONGEST_NOTE, min_width=240,
                scale=3,
            )  # fmt: skip
        self.cover = gr.CheckboxGroup([], label="Files that it covers", visible=False)
        # Looked up before it is used: Gradio would refuse what it does not remember having offered.
        self.cover.preprocess = lambda payload: payload  # type: ignore[method-assign]
        self.what = gr.HTML("", elem_classes="k-what", apply_default_css=False)
        self.approve = gr.Button(
            "Approve", variant="primary", interactive=False, size="sm", min_width=200, scale=0, elem_id="approve"
        )
        with gr.Row(equal_height=True):
            self.progress = gr.HTML("", elem_classes="k-under-way")
            self.stop = gr.Button("Stop", visible=False, variant="stop", size="sm", min_width=100, scale=0)
        self.rights = gr.Checkbox(False, label="Reviewers may approve", elem_id="reviewers-may-approve")

    @property
    def outputs(self) -> list[Any]:
        return [
            self.stands, self.check, self.withdraw, self.asking, self.cover, self.what, self.approve, self.progress,
            self.stop, self.rights,
        ]  # fmt: skip

    def show(
        self,
        told: Told,
        home: Home,
        export_id: str,
        standing: Standing | None,
        offer: Offer,
        seen: Evidence | None,
        covered: Sequence[str],
        mine: Sequence[tuple[Errand, Status]],
    ) -> None:
        """covered: names of files that are ticked. mine: errands of KINDS on this export, newest first."""
        busy = any(status.state not in ENDED for _, status in mine)
        told.say("stands", self.stands, stands(standing) if standing else Markup())
        told.visible("check", self.check, bool(standing and standing.unsure and not busy))
        told.visible("withdraw", self.withdraw, bool(standing and standing.since and _is_given(standing)))
        if not (standing and _is_given(standing)):
            told.visible("asking", self.asking, False)
        names = [file.file for file in offer.files]
        first = told.marks.get("cover")
        choices = [(f"{file.quant} · {size(file.bytes)}", file.file) for file in offer.files]
        told.tell(
            "cover",
            self.cover,
            [export_id, choices],
            lambda: gr.update(choices=choices, value=names, visible=bool(choices)),
        )
        ticked = names if told.marks.get("cover") != first else [name for name in names if name in covered]
        told.say("what", self.what, _what(offer, ticked, seen))
        can = bool(ticked) and not offer.reasons and not busy
        again = bool(standing and standing.approval)
        label = f"Approve {len(ticked)} {_plural('file', len(ticked))}" + (", in place of the last approval" * again)
        told.tell(
            "approve", self.approve, [label, can], lambda: gr.update(value=label if can else "Approve", interactive=can)
        )
        told.say("approving", self.progress, _progress(mine, standing))
        told.visible("stop approving", self.stop, busy)
        allowed = approval.reviewers_may_approve(home)
        told.tell("rights", self.rights, allowed, lambda: allowed)

    def begin(
        self,
        home: Home,
        export_id: str,
        who: str | None,
        role: str,
        note: str | None,
        covered: Sequence[str] | None,
        seen: Offer,
    ) -> None:
        """Starts the errand that approves. Raises what can be said at once; the errand looks at everything itself."""
        name = reviews.name(who or "")
        chosen = [file.file for file in seen.files if file.file in (covered or ())]
        if not chosen:
            raise DataError("No file is ticked. Tick those that may leave.")
        approval.check_right(home, name, role, export_id)
        request: dict[str, Any] = {"export": export_id, "who": name, "role": str(role), "note": _clean(note)}
        if len(chosen) < len(seen.files):
            request["files"] = chosen
        errands.start(home, "approve", request, name)

    def verify(self, home: Home, export_id: str) -> None:
        errands.start(home, "verify", {"export": export_id}, "panel")

    def end(self, home: Home, mine: Sequence[tuple[Errand, Status]]) -> None:
        for errand, status in mine:
            if status.state not in ENDED:
                errands.stop(home, errand.id)


def _clean(note: str | None) -> str:
    """The request is a file too: no token that was pasted by mistake gets into it."""
    note = note or ""
    if len(note) > reviews.LONGEST_NOTE:
        raise DataError(f"The note is too long: at most {reviews.LONGEST_NOTE:,} characters are kept.")
    return str(audit.without_secrets(note))


def _is_given(standing: Standing) -> bool:
    return standing.since is not None and standing.since.event == approval.APPROVED


# ------------------------------------------------------------------------------------------------------------- words


def stands(standing: Standing) -> Markup:
    """How the approval stands, and what it was given on."""
    given = standing.approval
    if given is None:
        return _nothing(standing)
    tone, word = (
        ("good", "Approved") if standing.valid else ("warn", "In doubt") if standing.unsure else ("bad", "Void")
    )
    said = [
        Markup('<p class="k-verdict"><span class="k-tone k-{}">{}</span> {}</p>').format(
            tone, word, f"by {given.who} ({given.role}) on {moment(given.time)}"
        )
    ]
    said += [Markup('<p class="k-{}">{}</p>').format(tone, reason) for reason in standing.reasons]
    if standing.reasons and not standing.unsure:
        said.append(Markup("<p>{}</p>").format("Nothing can be pushed until it is approved again."))
    said += [Markup('<p class="k-warn">{}</p>').format(late) for late in standing.later]
    if given.note:
        said.append(Markup('<p class="k-quoted">{}</p>').format(given.note))
    said.append(described(_facts(given).items()))
    link = files.export_address(given.export, "approval.json")
    said.append(Markup('<div class="k-files"><a href="{}" download>approval.json</a></div>').format(link))
    return Markup().join(said)


def _nothing(standing: Standing) -> Markup:
    word = standing.since
    if word is not None and word.event == approval.WITHDRAWN:
        note = str(word.facts.get("note") or "")
        said = f"Withdrawn by {word.who} ({word.role}) on {moment(word.time)}."
        quoted = Markup('<p class="k-quoted">{}</p>').format(note) if note else ""
        return Markup('<p class="k-verdict"><span class="k-tone k-warn">Not approved</span> {}</p>{}').format(
            said, quoted
        )
    tone = "bad" if word else "dim"
    return Markup('<p class="k-verdict"><span class="k-tone k-{}">Not approved</span> {}</p>').format(
        tone, " ".join(standing.reasons)
    )


def _facts(given: Approval) -> dict[str, str]:
    covers = ", ".join(file.quant for file in given.files)
    return {
        "Covers": f"{covers} ({size(given.bytes)}), {len(given.adapters)} {_plural('adapter', len(given.adapters))}",
        "Acceptance": "; ".join(
            f"{len(names)} {_plural('check', len(names))} passed by {', '.join(quants)}"
            for names, quants in _by_checks(given).items()
        ),
        "Seen then": seen_words(Evidence(given.probes, given.verdicts, given.recommendations)),
    }


def _by_checks(given: Approval) -> dict[tuple[str, ...], list[str]]:
    found: dict[tuple[str, ...], list[str]] = {}
    for quant, names in given.checks.items():
        found.setdefault(names, []).append(quant)
    return found


def seen_words(seen: Evidence) -> str:
    """In a line: probe runs, verdicts, recommendations."""
    said = []
    for probe in seen.probes[-1:]:
        counts = ", ".join(f"{count.column} {count.passed} of {count.asked}" for count in probe.counts)
        said.append(f"probes {probe.set}: {counts}")
    if len(seen.probes) > 1:
        more = len(seen.probes) - 1
        said.append(f"{more} earlier probe {_plural('run', more)}")
    said.append(
        f"{seen.verdicts.count} {_plural('verdict', seen.verdicts.count)}" if seen.verdicts.count else "no verdicts"
    )
    for word in seen.recommendations:
        said.append(f"{word.reviewer} {'for' if word.good else 'against'} it")
    return "; ".join(said)


def _what(offer: Offer, ticked: Sequence[str], seen: Evidence | None) -> Markup:
    """What exactly the button approves."""
    said = [Markup('<p class="k-bad">{}</p>').format(reason) for reason in offer.reasons]
    chosen = [file for file in offer.files if file.file in ticked]
    if chosen and not offer.reasons and seen is not None:
        listed = "\n".join(f"{file.sha256}  {file.file}" for file in chosen)
        total = size(sum(file.bytes for file in chosen))
        said.append(
            Markup("<p>You approve {}, as they are to the byte, having seen: {}.</p>").format(
                f"{len(chosen)} {_plural('file', len(chosen))} ({total})", seen_words(seen)
            )
        )
        said.append(
            Markup('<details class="k-sums"><summary>Which files, by sha256</summary><pre>{}</pre></details>').format(
                listed
            )
        )
        said.append(
            Markup('<p class="k-dim">{}</p>').format(
                "Every file is read whole first; with large ones that takes minutes."
            )
        )
    return Markup().join(said)


def _progress(mine: Sequence[tuple[Errand, Status]], standing: Standing | None) -> Markup:
    """The newest errand: where it is, or why it ended without an approval."""
    for errand, status in mine[:1]:
        who = f" for {errand.request.get('who', '')}" if errand.kind == "approve" else ""
        what = "Approving" + who if errand.kind == "approve" else "Checking"
        if status.state not in ENDED:
            return under_way(what, status)
        # What was said since then counts.
        since = standing.since if standing else None
        if status.state is State.succeeded or (since is not None and since.time > errand.created):
            return Markup()
        return ended("Not approved" if errand.kind == "approve" else "The check found", status)
    return Markup()


def under_way(what: str, status: Status) -> Markup:
    """An errand that reads or sends files: steps are MB."""
    step = f", {status.step:,} of {status.of:,} MB" if status.of else ""
    share = min(status.step / status.of, 1.0) if status.of else 0.0
    stopping = " · stopping" if status.state is State.stopping else ""
    return Markup(
        '<p><span class="k-tone k-busy">{}</span>: {}{}{}</p><progress max="1" value="{:.3f}"></progress>'
    ).format(what, status.phase, step, stopping, share)


def ended(what: str, status: Status) -> Markup:
    return Markup('<p class="k-said"><span class="k-tone k-{}">{}</span>: {} {}</p>').format(
        tones.of(status.state), what, status.reason, status.remedy
    )


def errands_of(home: Home, kinds: Sequence[str]) -> list[tuple[Errand, Status]]:
    """Errands of these kinds, newest first, with their status; a damaged one as failed."""
    found = []
    for errand in errands.everyone(home):
        if errand.kind in kinds:
            try:
                found.append((errand, errand.status()))
            except DataError as error:
                found.append((errand, Status(State.failed, reason=str(error))))
    return found


def asked(home: Home, export_id: str) -> tuple[Standing | None, Offer, str]:
    """Standing and offer of an export, and what is wrong where they cannot be told."""
    try:
        return approval.standing(home, export_id), approval.offer(home, export_id), ""
    except KatherineError as error:
        return None, Offer((), ()), str(error)


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
