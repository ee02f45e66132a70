"""A recipe model as a form: one control a field, chosen by the field's type, with label, reason, limits and source as
the model has them. What a value may be is the model's to say; this module only carries it to the page and back."""

from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal, get_args, get_origin

import gradio as gr

from katherine import recipe
from katherine.recipe import About, Recipe

# Below this a number is read more easily as 1e-4 than as 0.0001.
_SMALL = Decimal("0.001")


class Form:
    """The controls of one recipe, to be made inside a page. Those that people touch first come first, the others under
    "More". `components` are its controls in the order in which `values` takes and `show` gives them."""

    def __init__(self, model: type[Recipe]):
        self.model = model
        about = recipe.about(model)
        self._about = {each.name: each for each in about}
        self._usual = usual_source(about)
        controls: dict[str, Any] = {}
        with gr.Row(elem_classes="k-fields"):
            for each in about:
                if each.first:
                    controls[each.name] = self._control(each)
        rest = [each for each in about if not each.first]
        if rest:
            with gr.Accordion(f"More ({len(rest)})", open=False), gr.Row(elem_classes="k-fields"):
                for each in rest:
                    controls[each.name] = self._control(each)
        self.controls = {each.name: controls[each.name] for each in about}

    @property
    def components(self) -> list[Any]:
        return list(self.controls.values())

    @property
    def edits(self) -> list[Any]:
        """The events of a person's changes. Values that a handler sets raise none of them: `change` would, half-way
        through setting them."""
        found = []
        for control in self.controls.values():
            found.append(control.input)
            # In Gradio 6.31 a text's `input` comes with keys that write, not with Backspace nor with a paste, and a
            # list's not with a value of one's own.
            if isinstance(control, gr.Textbox):
                found += [control.blur, control.submit]
            elif isinstance(control, gr.Dropdown):
                found.append(control.blur)
        return found

    def values(self, given: Sequence[Any]) -> dict[str, Any]:
        """What the controls hold as a recipe's values. Nothing is judged here: the model says what is wrong."""
        return {name: _plain(value) for name, value in zip(self.controls, given, strict=True)}

    def edited(self, given: Sequence[Any], before: Mapping[str, Any]) -> dict[str, Any]:
        """The values that differ from what the page was given, as `shown` tells them."""
        return {name: value for name, value in self.values(given).items() if value != before.get(name)}

    @property
    def unfilled(self) -> dict[str, Any]:
        """What the controls hold before anything was shown in them: the model's defaults."""
        return self.shown({name: self.model.model_fields[name].get_default() for name in self.controls})

    def shown(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe's values as the controls hold them."""
        return {name: shown(self.model, name, values[name]) for name in self.controls}

    def show(self, values: Mapping[str, Any]) -> dict[Any, Any]:
        """The recipe's values for the controls, with no field marked."""
        return {self.controls[name]: self._marked(name, "", value=value) for name, value in self.shown(values).items()}

    def mark(self, wrong: Mapping[str, str], values: Mapping[str, Any] | None = None) -> dict[Any, Any]:
        """Each field named in `wrong` says what is wrong with it in place of its reason; the others are as they were.
        `values`, as `shown` tells them, are set; the others stay: a person may be typing."""
        found = {}
        for name, control in self.controls.items():
            value = {"value": values[name]} if values and name in values else {}
            found[control] = self._marked(name, wrong.get(name, ""), **value)
        return found

    def label(self, name: str) -> str:
        return self._about[name].label

    def _marked(self, name: str, wrong: str, **more: Any) -> Any:
        about = self._about[name]
        info = f"{about.label}{wrong.removeprefix(name)}" if wrong else self._info(about)
        classes = ["k-field", "k-wrong"] if wrong else ["k-field"]
        return gr.update(info=info, elem_classes=classes, **more)

    def _info(self, about: About) -> str:
        said = about.reason
        # That a text is not empty goes without saying.
        if about.limits not in ("", "not empty"):
            said += f" {about.limits[0].upper()}{about.limits[1:]}."
        if about.source != self._usual:
            said += f" Source: {about.source}."
        return said

    def _control(self, about: About) -> Any:
        field = self.model.model_fields[about.name]
        given: dict[str, Any] = {
            "label": about.label,
            "info": self._info(about),
            "interactive": True,
            "elem_id": f"{self.model.kind}-{about.name}",
            "elem_classes": ["k-field"],
            "min_width": 210,
        }
        value = shown(self.model, about.name, field.get_default())
        kind = field.annotation
        if get_origin(kind) is Literal:
            return gr.Dropdown(list(get_args(kind)), value=value, filterable=False, **given)
        if kind is bool:
            return gr.Checkbox(value, **given)
        if kind is int:
            # Without minimum and maximum: Gradio would refuse the whole form with a message that names no field.
            return gr.Number(value, step=1, **given)
        if kind is float:
            # Not a Number: browsers write 5e-6 as 0.000005, and take 1e-4 apart while it is typed.
            return gr.Textbox(value, max_lines=1, **given)
        if get_origin(kind) is tuple and get_args(kind) == (str, ...):
            choices = list(dict.fromkeys([*about.suggestions, *value]))
            return gr.Dropdown(choices, value=value, multiselect=True, allow_custom_value=True, **given | _WIDE)
        if kind is str:
            if about.suggestions:
                return gr.Dropdown(list(about.suggestions), value=value, allow_custom_value=True, **given)
            return gr.Textbox(value, max_lines=1, **given)
        raise TypeError(f"No control is known for {self.model.__name__}.{about.name}: {kind}")


_WIDE = {"min_width": 320}


def usual_source(about: Sequence[About]) -> str:
    """The source that most fields have: said once, and only where another holds beside its field."""
    return Counter(each.source for each in about).most_common(1)[0][0]


def shown(model: type[Recipe], name: str, value: Any) -> Any:
    """A recipe's value as its control takes it."""
    kind = model.model_fields[name].annotation
    if kind is float:
        return written(value)
    return list(value) if isinstance(value, tuple | list) else value


def as_text(model: type[Recipe], name: str, value: Any) -> str:
    """A recipe's value in a sentence or a table."""
    given = shown(model, name, value)
    if isinstance(given, list):
        return ", ".join(map(str, given))
    return {True: "on", False: "off"}[given] if isinstance(given, bool) else str(given)


def written(value: float) -> str:
    """A number as people write it: 1e-4, 5e-6, 0.05. Read back, it is the same number to the last bit."""
    number = Decimal(repr(float(value))).normalize()
    if number == 0 or _SMALL <= abs(number) < 1_000_000:
        return f"{number:f}"
    digits, _, exponent = f"{number:e}".partition("e")
    return f"{digits}e{int(exponent)}"


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip()
    # An emptied control: the model then says what it wants instead.
    return "" if value is None else value
