"""The status strip, above every tab: GPUs, the run under way, disk, money, auto-stop, and in plain words what looks
wrong. What each figure means is decided in `katherine` and `jobs`; here it is only laid out."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
from markupsafe import Markup

from jobs import autostop, queue, slot
from jobs.autostop import Phase
from katherine import disk, pace, pod, prices, telemetry, units
from katherine.errors import KatherineError
from katherine.gpu import GpuReading
from katherine.history import Seen
from katherine.pace import Pace
from katherine.runs import State
from katherine.telemetry import Reading
from ui import runs
from ui.edge import shown
from ui.panel import Live, Panel

EVERY = 2.0
GIB = 2**30


def build(panel: Panel) -> Live:
    with gr.Group(elem_id="strip"):
        figures = gr.HTML(_empty(), elem_id="strip-figures", apply_default_css=False)
        with gr.Row(elem_id="strip-notices"):
            notices = gr.HTML(_empty(), elem_id="strip-words", apply_default_css=False, min_width=280)
            keep = gr.Button("Keep running", size="sm", variant="primary", visible=False, scale=0, min_width=130)
            seen = gr.Button("I have seen it", size="sm", visible=False, scale=0, min_width=130)
            with gr.Row(visible=pod.here() is not None, elem_id="strip-autostop"):
                enabled = gr.Checkbox(
                    lambda: autostop.settings(panel.home).enabled,
                    label="Stop the pod when the queue is empty, after",
                    container=False,
                    min_width=300,
                )
                minutes = gr.Number(
                    lambda: autostop.settings(panel.home).minutes,
                    label="Minutes of countdown before the pod is stopped",
                    show_label=False,
                    container=False,
                    min_width=64,
                    elem_id="strip-minutes",
                )

    def refresh() -> dict[Any, Any]:
        now = autostop.view(panel.home)
        reading = panel.watch.latest()
        return {
            figures: _figures(panel, reading),
            notices: _notices(panel, reading, now),
            keep: gr.update(visible=now.can_cancel),
            seen: gr.update(visible=now.loud),
            # Another page, or the command line, may have changed it.
            enabled: autostop.settings(panel.home).enabled,
        }

    def kept() -> dict[Any, Any]:
        autostop.cancel(panel.home, "the operator")
        return refresh()

    def acknowledged() -> dict[Any, Any]:
        autostop.acknowledge(panel.home)
        return refresh()

    def chosen(wanted: bool, after: float | None) -> dict[Any, Any]:
        autostop.configure(panel.home, wanted, after)
        return refresh()

    outputs = [figures, notices, keep, seen, enabled]
    for event, handler, inputs in (
        (keep.click, kept, []),
        (seen.click, acknowledged, []),
        # What a person did, not what a refresh changed.
        (enabled.input, chosen, [enabled, minutes]),
        (minutes.submit, chosen, [enabled, minutes]),
        (minutes.blur, chosen, [enabled, minutes]),
    ):
        event(
            shown(handler),
            inputs=inputs,
            outputs=outputs,
            show_progress="hidden",
            # Queued, since Gradio's page drops the error messages of events that are not.
            queue=True,
            api_visibility="private",
        )
    return Live(refresh, outputs, every=EVERY)


# ------------------------------------------------------------------------------------------------------------- figures


def _empty() -> Markup:
    return Markup("<div class='k-strip'></div>")


def _figures(panel: Panel, reading: Reading | None) -> Markup:
    under_way = panel.history.under_way()
    running = [seen for seen in under_way if seen.status.state is not State.queued]
    queued = [seen for seen in under_way if seen.status.state is State.queued]
    return Markup("<div class='k-strip'><div>{}</div><div>{}</div><div>{}</div></div>").format(
        _gpus(reading), _job(panel, running, queued, _cards_of(panel, reading)), _ledger(panel)
    )


def _gpus(reading: Reading | None) -> Markup:
    if reading is None:
        return _lines("GPU", Markup("<span class='k-dim'>being read</span>"))
    if reading.error:
        return _lines("GPU", Markup("<span class='k-tone k-bad'>no answer</span>"))
    if not reading.cards:
        return _lines("No GPU", Markup("<span class='k-dim'>the small base trains on the CPU</span>"))
    several = len(reading.cards) > 1
    return Markup("").join(
        _card(card, f"GPU {card.index} · {card.name}" if several else card.name) for card in reading.cards
    )


def _cards_of(panel: Panel, reading: Reading | None) -> dict[str, str]:
    """Where there are several GPUs: run → the numbers of those that it holds, in words."""
    found: dict[str, str] = {}
    if reading is not None and len(reading.cards) > 1:
        for card in reading.cards:
            holder = slot.holder(panel.home, str(card.index))
            if holder is not None and holder.run:
                before = found.get(holder.run)
                found[holder.run] = f"{before}, {card.index}" if before else f"GPU {card.index}"
    return found


def _card(card: GpuReading, name: str) -> Markup:
    used, total = card.memory_used, card.memory_total
    memory = None if used is None or not total else used / total
    watts = None if card.power is None or not card.power_limit else card.power / card.power_limit
    measures = [
        _measure("load", None if card.utilisation is None else card.utilisation / 100, f"{card.utilisation}%"),
        _measure(
            "memory",
            memory,
            f"{(used or 0) / GIB:.1f} / {(total or 0) / GIB:.0f} GiB",
            "warn" if telemetry.memory_tight(card) else "",
        ),
        _measure("power", watts, f"{card.power or 0:.0f} / {card.power_limit or 0:.0f} W"),
    ]
    return Markup("<div class='k-strip-card'><b>{}</b>{}</div>").format(name, Markup("").join(measures))


def _measure(name: str, share: float | None, text: str, tone: str = "") -> Markup:
    if share is None:
        return Markup("<span class='k-strip-measure'><small>{} not reported</small></span>").format(name)
    return Markup("<span class='k-strip-measure {}'><small>{}</small> {}{}</span>").format(
        f"k-{tone}" if tone else "", name, text, _bar(share)
    )


def _bar(share: float) -> Markup:
    return Markup("<span class='k-strip-bar'><i style='width:{}%'></i></span>").format(
        f"{min(max(share, 0.0), 1.0) * 100:.1f}"
    )


def _job(panel: Panel, running: list[Seen], queued: list[Seen], cards: dict[str, str]) -> Markup:
    if not running:
        why = Markup("<span class='k-dim' title='{0}'>{0}</span>").format(_waiting(panel, queued))
        return _lines("Nothing is running", why)
    # One on each GPU at the most; what is queued waits for any of them.
    *others, last = running
    each = [*(_under_way(seen, cards) for seen in others), _under_way(last, cards, len(queued))]
    return Markup("").join(Markup("<div class='k-strip-job'>{}</div>").format(one) for one in each)


def _under_way(seen: Seen, cards: dict[str, str], queued: int = 0) -> Markup:
    status = seen.status
    speed = pace.of(seen.run, status)
    phase = "stopping" if status.state is State.stopping else status.phase
    steps = f"step {status.step:,} of {status.of:,}" if status.of else ""
    head = Markup("<b class='k-tone k-busy'>{}</b> <span title='{}'>{}</span>").format(
        runs.named(seen.kind),
        seen.id,
        _joined(cards.get(seen.id, ""), phase, steps, f"{queued} queued behind it" if queued else ""),
    )
    return _lines(head, _bar(status.step / status.of if status.of else 0.0), _speed(speed))


def _waiting(panel: Panel, queued: list[Seen]) -> str:
    ready = [seen for seen in queued if not queue.blocked(panel.home, seen.run)]
    if not queued:
        return "the queue is empty"
    if not ready:
        return f"{len(queued)} queued behind an interrupted run: resume or stop it"
    return _joined(f"{len(queued)} queued", ready[0].status.reason)


def _speed(speed: Pace) -> Markup:
    if speed.seconds_per_step is None:
        since = "" if speed.since_step is None else f"no step yet, {units.duration(speed.since_step)} so far"
        return Markup("<span class='k-dim'>{}</span>").format(since)
    if speed.stalled:
        return Markup("<span class='k-tone k-warn'>no step for {}</span>").format(units.duration(speed.since_step))
    tokens = "" if speed.tokens_per_second is None else f"{speed.tokens_per_second:,.0f} tokens/s"
    left = "" if speed.seconds_left is None else f"{units.duration(round(speed.seconds_left))} left"
    return Markup("<span>{}</span>").format(_joined(f"{_seconds(speed.seconds_per_step)} a step", tokens, left))


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else units.duration(seconds)


def _ledger(panel: Panel) -> Markup:
    lines: list[str | Markup] = [_disk(panel)]
    if (money := _money(panel)) is not None:
        lines.append(money)
    return _lines(*lines)


def _disk(panel: Panel) -> Markup:
    try:
        room = disk.room(panel.home.root)
    except OSError as error:
        return Markup("<span class='k-tone k-bad'>disk: {}</span>").format(error.strerror or "no answer")
    if not room.quota_known:
        return Markup(
            "<span title='The volume tells the whole cluster, not what you rented'>disk: see your quota</span>"
        )
    tone = "k-tone k-warn" if room.nearly_full else ""
    return Markup("<span class='{}'>{} free of {}</span>").format(tone, units.size(room.free), units.size(room.total))


def _money(panel: Panel) -> Markup | None:
    """None where nothing is paid by the hour."""
    here = pod.here()
    if here is None:
        return None
    try:
        # A driver that stopped answering does not make the pod cheaper.
        name = next((look.cards[0].name for look in reversed(panel.watch.history()) if look.cards), "")
        price = prices.hourly(panel.home, name)
    except KatherineError:
        return Markup("<span class='k-tone k-warn'>prices cannot be read</span>")
    if price is None:
        return Markup("<span class='k-dim'>price not known: set it under Recipe</span>")
    spent, hour = here.dollars(price.dollars), price.dollars * max(here.gpus, 1)
    return Markup("<span title='{}'><b>{}</b> so far, {} an hour</span>").format(
        f"Since this pod started, {units.duration(here.hours() * 3600)} ago, without storage. {price.source}",
        units.dollars(spent),
        units.dollars(hour),
    )


def _lines(*lines: str | Markup) -> Markup:
    return Markup("").join(Markup("<div>{}</div>").format(line) for line in lines)


def _joined(*parts: str) -> str:
    return " · ".join(part for part in parts if part)


# ------------------------------------------------------------------------------------------------------------- notices


def _notices(panel: Panel, reading: Reading | None, now: autostop.View) -> Markup:
    return Markup("<div class='k-strip-notices'>{}</div>").format(
        Markup("").join(
            Markup("<p class='k-tone k-{}'>{}</p>").format(tone, text) for tone, text in _warnings(panel, reading, now)
        )
    )


def _warnings(panel: Panel, reading: Reading | None, now: autostop.View) -> Iterator[tuple[str, str]]:
    """(tone, sentence), what costs most first."""
    if now.loud:
        yield "bad", autostop.words(now)
    elif now.can_cancel or now.phase is Phase.accepted:
        yield "warn", autostop.words(now)
    elif now.phase is Phase.cancelled:
        yield "dim", autostop.words(now)
    if reading is not None and reading.error:
        yield "bad", reading.error
    if found := telemetry.diagnosis(panel.watch.history()):
        yield "warn", found
    if reading is not None:
        for card in reading.cards:
            if telemetry.memory_tight(card):
                yield "warn", f"The memory of the {card.name} is nearly full: a longer batch may not fit."
    try:
        room = disk.room(panel.home.root)
    except OSError as error:
        yield "bad", f"The disk of {panel.home.root} does not answer: {error.strerror or error}."
        return
    if room.quota_known and room.nearly_full:
        yield "warn", f"Only {units.size(room.free)} free on the disk of {panel.home.root}: remove what is not needed."
