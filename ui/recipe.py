"""The recipe tab: what will be started next, as forms made from the recipe models, how it differs from its preset, and
what it will take. The draft is katherine.drafts', the figures estimate's and prices'; here they are laid out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from katherine import drafts, estimate, gpu, presets, prices, recipe, shapes, units
from katherine.drafts import Draft
from katherine.errors import KatherineError, SetupError
from katherine.estimate import Estimate, Plan
from katherine.recipe import KINDS, SftRecipe
from ui.edge import message, shown
from ui.forms import Form, as_text, usual_source
from ui.held import held
from ui.panel import Live, Panel
from ui.runs import named
from ui.sheet import Sheet
from ui.table import Cell, Table

TITLE = "Recipe"
# As many past runs as a list is read for.
RUNS = 60
OUTDATED = "This form was out of date: it shows the draft as it is now."
# Through Gradio's queue, with no limit: of a handler beside it, 6.31 shows no error and no message.
_QUIET: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}


def build(panel: Panel) -> Live:
    return _Page(panel).live


class _Page:
    """The tab's components, and the handlers that fill them. What it shows is on disk; it remembers nothing."""

    def __init__(self, panel: Panel):
        self._panel = panel
        self._home = panel.home
        self._lay_out()
        self._wire()
        self.live = Live(self._refresh, self._everything, self._sheets)

    # ------------------------------------------------------------------------------------------- components

    def _lay_out(self) -> None:
        with gr.Row(elem_classes="k-recipe"):
            with gr.Column(scale=3, min_width=340):
                self.about = gr.HTML("")
                with gr.Row(elem_classes="k-from"):
                    self.preset = gr.Dropdown(
                        list(recipe.PRESETS), label="Preset", info="Choosing one sets every field below.",
                        allow_custom_value=True, min_width=160,
                    )  # fmt: skip
                    self.run = gr.Dropdown(
                        [], label="Load from a run", info="Takes its recipe and those it was built on.",
                        allow_custom_value=True, min_width=220,
                    )  # fmt: skip
                self.forms: dict[str, Form] = {}
                self.switches: dict[str, gr.Checkbox] = {}
                self.bodies: dict[str, gr.Column] = {}
                self.problems: dict[str, gr.HTML] = {}
                self.drawn: dict[str, Any] = {}
                self.kept: dict[str, Any] = {}
                for kind, model in KINDS.items():
                    self._lay_out_stage(kind, model)
            with gr.Column(scale=2, min_width=340, elem_classes="k-beside"):
                self.card = gr.HTML("", elem_classes="k-estimate", apply_default_css=False)
                with gr.Accordion("Prices", open=False):
                    self._lay_out_prices()
                with gr.Accordion("Differs from the preset", open=True):
                    self.differs = Table(
                        ["Field", "Yours", "Preset", "Reason"],
                        "Nothing: every stage that is on is as the preset has it.",
                        elem_classes="k-differs",
                    )
                with gr.Accordion("Keep as a preset", open=False):
                    self.name = gr.Textbox(label="Name", info="Letters, digits, dots, - and _.", elem_id="preset-name")
                    with gr.Row():
                        self.keep = gr.Button("Save", size="sm", min_width=110)
                        self.drop = gr.Button("Delete", size="sm", min_width=110)
                with gr.Accordion("JSON", open=False):
                    self.json = gr.Code("", language="json", label="These recipes", interactive=False, max_lines=24)
                    self.pasted = gr.Textbox(label="Paste recipes", lines=3, max_lines=12, elem_id="recipe-paste")
                    self.paste = gr.Button("Use this JSON", size="sm")

    def _lay_out_stage(self, kind: str, model: type[recipe.Recipe]) -> None:
        source = usual_source(recipe.about(model))
        with gr.Column(elem_classes="k-stage"):
            with gr.Row(elem_classes="k-stage-head"):
                said = (model.__doc__ or "").strip()
                gr.HTML(
                    Markup("<h3>{}</h3><p class='k-dim'>{} Source, where no other is named: {}.</p>").format(
                        named(kind), said, source
                    ),
                    min_width=200,
                )
                self.switches[kind] = gr.Checkbox(
                    True, label="On", interactive=kind != drafts.ALWAYS, min_width=70, scale=0, elem_id=f"{kind}-on"
                )
            with gr.Column(elem_classes="k-stage-body") as body:
                self.problems[kind] = gr.HTML("", elem_classes="k-problems")
                self.forms[kind] = form = Form(model)
                # A ui.sheet.Sheet, travelling with the page.
                drawn, kept = Sheet.blank(form.unfilled)
                self.drawn[kind], self.kept[kind] = held(drawn), held(kept)
                if kind == "sft":
                    self.reached = gr.HTML("", elem_classes="k-reached")
            self.bodies[kind] = body

    def _lay_out_prices(self) -> None:
        self.prices = Table(["Kind", "$ an hour#", "Of"], "No kind of GPU has a price.", selects=True)
        with gr.Row():
            self.kind = gr.Dropdown(
                [], label="Kind of GPU", allow_custom_value=True, min_width=140, elem_id="price-kind"
            )
            self.dollars = gr.Textbox(label="Dollars an hour", max_lines=1, min_width=110, elem_id="price-dollars")
        with gr.Row():
            self.enter = gr.Button("Enter this price", size="sm", min_width=110)
            self.forget = gr.Button("Take it back", size="sm", min_width=110)

    @property
    def _beside(self) -> list[Any]:
        """What follows from the draft, whatever was changed."""
        return [self.about, self.card, self.differs, self.json, self.reached]

    @property
    def _all_forms(self) -> list[Any]:
        stages = [*self.switches.values(), *self.bodies.values(), *self.problems.values(), *self.drawn.values()]
        return [*stages, *(control for form in self.forms.values() for control in form.components)]

    @property
    def _sheets(self) -> list[Any]:
        return [*self.drawn.values(), *self.kept.values()]

    @property
    def _everything(self) -> list[Any]:
        return [*self._beside, *self._all_forms, self.preset, self.run, self.prices, self.kind]

    # ------------------------------------------------------------------------------------------- wiring

    def _wire(self) -> None:
        for kind, form in self.forms.items():
            gr.on(
                form.edits,
                shown(self._edited(kind)),
                [self.drawn[kind], self.kept[kind], *form.components],
                [self.kept[kind], self.problems[kind], *form.components, *self._beside, self.preset, self.run],
                # While one change is being kept, only the newest of those that follow is sent.
                trigger_mode="always_last",
                **_QUIET,
            )
            # A drawing and the answer to an edit may overtake each other: whichever comes last, the form is looked at.
            gr.on(
                [self.drawn[kind].change, self.kept[kind].change],
                shown(self._settled(kind)),
                [self.drawn[kind], self.kept[kind]],
                [self.drawn[kind], self.problems[kind], *form.components, *self._beside],
                trigger_mode="always_last",
                show_progress="hidden",
                queue=False,  # nothing that a person did
                api_visibility="private",
            )
            if kind != drafts.ALWAYS:
                self.switches[kind].input(
                    shown(self._switched(kind)),
                    self.switches[kind],
                    [*self.switches.values(), *self.bodies.values(), *self._beside],
                    **_QUIET,
                )
        self.preset.input(shown(self._use_preset), self.preset, self._everything, **_QUIET)
        self.run.input(shown(self._use_run), self.run, self._everything, **_QUIET)
        self.keep.click(shown(self._keep), self.name, self._everything, **_QUIET)
        self.drop.click(shown(self._drop), self.name, self._everything, **_QUIET)
        self.paste.click(shown(self._paste), self.pasted, [*self._everything, self.pasted], **_QUIET)
        priced = [self.prices, self.kind, self.dollars, self.card]
        self.enter.click(shown(self._enter), [self.kind, self.dollars], priced, **_QUIET)
        self.dollars.submit(shown(self._enter), [self.kind, self.dollars], priced, **_QUIET)
        self.forget.click(shown(self._forget), self.kind, priced, **_QUIET)
        self.prices.select(shown(self._choose_price), None, [self.kind, self.dollars], **_QUIET)

    # ------------------------------------------------------------------------------------------- handlers

    def _refresh(self, *sheets: Any) -> dict[Any, Any]:
        draft = drafts.load(self._home)
        found = self._stages(draft) | self._following(draft) | self._choices(draft) | self._price_list()
        count = len(KINDS)
        for kind, drawn, kept in zip(KINDS, sheets[:count], sheets[count:], strict=True):
            sheet = Sheet(drawn, kept)
            # A form that shows the draft already is left alone: somebody may be typing in it.
            if self._is_behind(sheet, draft, kind):
                found |= self._drawing(draft, kind, [] if sheet.overtaken else sheet.waiting)
            elif not sheet.waiting:
                found[self.problems[kind]] = ""
        return found

    def _settled(self, kind: str) -> Callable[[Any, Any], Any]:
        def settled(drawn: Any, kept: Any) -> Any:
            sheet = Sheet(drawn, kept)
            if not sheet.overtaken:
                return gr.skip()
            draft = drafts.load(self._home)
            if not self._is_behind(sheet, draft, kind):
                return gr.skip()
            return self._drawing(draft, kind, sheet.waiting) | self._following(draft)

        return settled

    def _edited(self, kind: str) -> Callable[..., dict[Any, Any]]:
        form = self.forms[kind]

        def edited(drawn: Any, kept: Any, *given: Any) -> dict[Any, Any]:
            sheet = Sheet(drawn, kept)
            changes = form.edited(given, sheet.holds)
            found = drafts.edit(self._home, kind, changes)
            now = form.shown(found.draft.values[kind])
            # What came from elsewhere meanwhile is shown, except where a person changed something here.
            news = {
                name: value for name, value in now.items() if name not in changes and value != sheet.stands_for[name]
            }
            waiting = [name for name in changes if name not in found.kept]
            said = list(found.conflicts)
            if found.wrong:
                said.insert(0, _not_kept(form, found.wrong))
            elif said:
                said.insert(0, "Not kept until these fit each other:")
            if news:
                said.append(OUTDATED)
            holds = {name: changes[name] for name in found.kept} | news
            shows: dict[Any, Any] = {
                self.kept[kind]: sheet.kept(holds, now, waiting),
                self.problems[kind]: _problems(said),
            }
            shows |= form.mark(found.wrong, news)
            if changes or news:
                shows |= self._following(found.draft)
            if news:
                shows |= {self.preset: found.draft.preset, self.run: found.draft.run}
            return shows

        return edited

    def _switched(self, kind: str) -> Callable[[bool], dict[Any, Any]]:
        def switched(on: bool) -> dict[Any, Any]:
            draft = drafts.set_stage(self._home, kind, bool(on))
            return self._stages(draft) | self._following(draft)

        return switched

    def _use_preset(self, name: Any) -> dict[Any, Any]:
        return self._whole(drafts.use_preset(self._home, str(name or "")))

    def _use_run(self, run: Any) -> Any:
        if not run:
            return gr.skip()
        return self._whole(drafts.use_run(self._home, str(run)))

    def _keep(self, name: Any) -> dict[Any, Any]:
        name = str(name or "").strip()
        presets.save(self._home, name, drafts.load(self._home).values)
        gr.Info(message(f"Kept as the preset {name}."))
        return self._whole(drafts.change(self._home, preset=name))

    def _drop(self, name: Any) -> dict[Any, Any]:
        name = str(name or "").strip()
        presets.delete(self._home, name)
        gr.Info(message(f"The preset {name} is deleted."))
        return self._whole(drafts.load(self._home))

    def _paste(self, text: Any) -> dict[Any, Any]:
        return self._whole(drafts.paste(self._home, str(text or ""))) | {self.pasted: ""}

    def _enter(self, kind: Any, dollars: Any) -> dict[Any, Any]:
        prices.enter(self._home, str(kind or ""), dollars, _gpu_name())
        return self._priced() | {self.dollars: ""}

    def _forget(self, kind: Any) -> dict[Any, Any]:
        prices.forget(self._home, str(kind or ""))
        return self._priced()

    def _choose_price(self, event: gr.EventData) -> dict[Any, Any]:
        kind = str(event.id)
        found = self._prices().get(kind)
        return {self.kind: kind, self.dollars: f"{found.dollars:.2f}" if found else ""}

    # ------------------------------------------------------------------------------------------- values

    def _whole(self, draft: Draft) -> dict[Any, Any]:
        found = self._stages(draft) | self._following(draft) | self._choices(draft)
        for kind in KINDS:
            found |= self._drawing(draft, kind)
        return found | self._price_list()

    def _drawing(self, draft: Draft, kind: str, lost: Sequence[str] = ()) -> dict[Any, Any]:
        """The whole form of a stage, and with it what it then holds. lost: fields whose text goes with that, unkept."""
        form, values = self.forms[kind], draft.values[kind]
        said = [_not_kept(form, lost), OUTDATED] if lost else []
        return form.show(values) | {
            self.problems[kind]: _problems(said),
            self.drawn[kind]: Sheet.drawn(form.shown(values)),
        }

    def _is_behind(self, sheet: Sheet, draft: Draft, kind: str) -> bool:
        """Whether the form was given other values than the draft has."""
        return sheet.stands_for != self.forms[kind].shown(draft.values[kind])

    def _stages(self, draft: Draft) -> dict[Any, Any]:
        found: dict[Any, Any] = {switch: kind in draft.stages for kind, switch in self.switches.items()}
        return found | {body: gr.update(visible=kind in draft.stages) for kind, body in self.bodies.items()}

    def _choices(self, draft: Draft) -> dict[Any, Any]:
        seen = [each for each in self._panel.history.runs() if each.kind in KINDS][:RUNS]
        runs = [
            (f"{named(each.kind)}, {units.moment(each.run.record.created)}, {each.status.state}", each.id)
            for each in seen
        ]
        return {
            self.preset: gr.update(choices=recipe.preset_names(self._home), value=draft.preset),
            self.run: gr.update(choices=runs, value=draft.run),
        }

    def _following(self, draft: Draft) -> dict[Any, Any]:
        return {
            self.about: self._about(draft),
            self.card: self._card(draft),
            self.differs: self.differs.rows(list(self._differences(draft))),
            self.json: drafts.to_json(draft),
            self.reached: _reached(self._reach(draft)),
        }

    def _about(self, draft: Draft) -> Markup:
        remarks = Markup("").join(Markup("<p class='k-warn'>{}</p>").format(remark) for remark in draft.remarks)
        if draft.dataset is None:
            return Markup("<p class='k-warn'>No dataset is chosen: choose one on the Dataset tab.</p>") + remarks
        try:
            counts = estimate.counted(self._home, draft.dataset)
        except KatherineError as error:
            return Markup("<p class='k-bad'>{}</p>").format(str(error)) + remarks
        said = f"{counts['sft']['unique']:,} conversations, {counts['dpo']['used']:,} pairs in use."
        return Markup("<p>Dataset <b>{}</b>: {} Changes are kept as you make them.</p>{}").format(
            draft.dataset, said, remarks
        )

    def _differences(self, draft: Draft) -> Iterator[list[Any]]:
        try:
            found = drafts.differences(self._home, draft)
        except KatherineError as error:
            yield [Cell(str(error), tone="warn"), "", "", ""]
            return
        for each in found:
            model = KINDS[each.kind]
            yield [
                f"{named(each.kind)}: {each.about.label}",
                as_text(model, each.about.name, each.yours),
                as_text(model, each.about.name, each.theirs),
                each.about.reason,
            ]

    def _reach(self, draft: Draft) -> list[str]:
        sft = draft.recipe("sft")
        assert isinstance(sft, SftRecipe)
        shape = shapes.of(self._home, sft.base)
        if shape is None:
            return []
        size = shape.adapter(sft.lora_r, sft.target_modules)
        share = f"{size / 1e6:,.1f} million weights are trained, {size / shape.parameters:.1%} of the model."
        return [*shape.reached(sft.target_modules), share]

    def _card(self, draft: Draft) -> Markup:
        try:
            return card(estimate.plan(self._home, draft))
        except KatherineError as error:
            return Markup("<p class='k-bad'>{}</p>").format(str(error))

    def _prices(self) -> dict[str, prices.Price]:
        found = prices.listed(self._home)
        pod = prices.this_pod(self._home)
        return {prices.THIS_POD: pod, **found} if pod else found

    def _price_list(self) -> dict[Any, Any]:
        try:
            found = self._prices()
        except KatherineError as error:
            return {self.prices: self.prices.rows([[Cell(str(error), tone="bad"), "", ""]], [""]), self.kind: gr.skip()}
        rows = [
            [name, Cell(f"{price.dollars:.2f}", price.dollars), price.dated or price.source]
            for name, price in found.items()
        ]
        names = list(dict.fromkeys([prices.THIS_POD, *found]))
        return {self.prices: self.prices.rows(rows, list(found)), self.kind: gr.update(choices=names)}

    def _priced(self) -> dict[Any, Any]:
        return self._price_list() | {self.card: self._card(drafts.load(self._home))}


# ----------------------------------------------------------------------------------------------- words and pictures


def card(plan: Plan) -> Markup:
    """The estimate as the page shows it: steps, a row a machine, disk, and what it all rests on."""
    parts = [Markup("<h3>What it will take</h3>")]
    parts += [Markup("<p>{}</p>").format(sentence) for sentence in plan.explained]
    parts += [Markup("<p class='k-warn'>{}</p>").format(remark) for remark in plan.remarks]
    rows = Markup("").join(_row(each) for each in plan.estimates)
    parts.append(
        Markup(
            "<table><thead><tr><th>Machine</th><th>Time</th><th>GPU memory</th><th>Cost</th></tr></thead>"
            "<tbody>{}</tbody></table>"
        ).format(rows)
    )
    parts += [
        Markup("<p class='{}'>{}: {}</p>").format(
            "k-bad" if warning.startswith("It does not") else "k-warn", each.machine.name, warning
        )
        for each in plan.estimates
        for warning in each.warnings
    ]
    parts += _stages_of(plan)
    parts += _disk_of(plan)
    parts += _bases_of(plan)
    return Markup("").join(parts)


def _row(each: Estimate) -> Markup:
    price = each.machine.price
    hourly = "" if price is None else f"{units.dollars(each.machine.hourly)} an hour, {price.dated or 'first estimate'}"
    learned = f"from {each.learned} finished run{'s' if each.learned > 1 else ''}" if each.learned else ""
    under = ", ".join(part for part in (hourly, learned) if part)
    least = bool(each.missing)
    return Markup("<tr{}><th>{}{}</th>{}{}{}</tr>").format(
        Markup(" class='k-here'") if each.machine.here else "",
        each.machine.name,
        _small(under),
        _figure(estimate.words(each.seconds, estimate.roughly, least), each.missing and "no basis"),
        _figure(estimate.words(each.memory, estimate.gib), "", f"most: {named(each.memory_of)}"),
        _figure(estimate.words(each.dollars, units.dollars, least), "no price" if price is None else ""),
    )


def _figure(said: str, otherwise: Any = "", under: str = "") -> Markup:
    if not said:
        return Markup("<td class='k-dim'>{}</td>").format(otherwise or "not known")
    value, _, span = said.partition(" (")
    return Markup("<td>{}{}{}</td>").format(value, _small(span.rstrip(")")), _small(under))


def _small(text: str) -> Markup:
    return Markup("<small>{}</small>").format(text) if text else Markup("")


def _stages_of(plan: Plan) -> Iterator[Markup]:
    """How the time is spent, on the first machine that has a figure."""
    each = next((each for each in plan.estimates if each.seconds), None)
    if each is None:
        return
    said = []
    for kind, stage in each.stages.items():
        time = estimate.roughly(stage.seconds.value) if stage.seconds else "not known"
        if stage.seconds and stage.missing:
            time += f" without {', '.join(stage.missing)}"
        said.append(f"{named(kind)} {time}")
    yield Markup("<p><b>{}:</b> {}.</p>").format(each.machine.name, ", ".join(said))


def _disk_of(plan: Plan) -> Iterator[Markup]:
    disk = plan.disk
    if disk is None:
        return
    parts = ", ".join(f"{what} {units.size(size)}" for what, size in disk.parts)
    yield Markup(
        "<p><b>Disk:</b> {} at the fullest, {} of it to stay. <span class='k-dim'>Namely {}.</span></p>"
    ).format(units.size(disk.needed), units.size(disk.kept), parts)
    if not disk.fits:
        yield Markup("<p class='k-bad'>Only {} are free: make room, or name fewer quants.</p>").format(
            units.size(disk.free)
        )
    elif not disk.quota_known:
        yield Markup("<p class='k-warn'>The volume does not tell its quota: see that it has that much.</p>")


def _bases_of(plan: Plan) -> Iterator[Markup]:
    found = dict.fromkeys(
        part
        for each in plan.estimates
        for stage in each.stages.values()
        for figure in (*stage.parts.values(), stage.memory)
        if figure
        for part in figure.basis.split("; ")
        if part and not part.startswith("weights ")
    )
    if found:
        yield Markup("<p class='k-dim'>Estimates with their likely range: {}.</p>").format("; ".join(found))


def _not_kept(form: Form, names: Iterable[str]) -> str:
    return f"Not kept: {', '.join(form.label(name) for name in names)}."


def _problems(said: list[str]) -> Markup:
    return Markup("").join(Markup("<p class='k-bad'>{}</p>").format(each) for each in said)


def _reached(said: list[str]) -> Markup:
    return Markup("<p>{}</p>").format(" ".join(said)) if said else Markup("")


def _gpu_name() -> str:
    try:
        cards = gpu.read()
    except SetupError:
        return ""
    return cards[0].name if cards else ""
