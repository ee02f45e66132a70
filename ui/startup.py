"""What Gradio does while it starts that a panel has no use for, left out: more than half of what the start takes.

Whenever it is imported, it writes stub files for editors beside its components' source and renders the documentation of
each event. And while a page is built, it makes a web app of it three times over, of which the last is used."""

import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gradio as gr

_MODULE = "gradio.component_meta"
# Handlers of one event at a time: one slow handler of one visitor does not hold up the same handler of another.
_AT_ONCE = 8


class _Finder(importlib.abc.MetaPathFinder):
    """Finds that one module as Python does, and has it loaded without what it writes."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == _MODULE else None
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        # Another version may call them otherwise: it is slower then, and right.
        for holder, name, instead in (
            (module, "create_or_modify_pyi", _remember_signature),
            (getattr(module, "EventListener", None), "set_doc", _render_nothing),
        ):
            if hasattr(holder, name):
                setattr(holder, name, instead)


def _remember_signature(component: type, *_: Any) -> None:
    """Called where each component's class has been made. Gradio works its parameters out anew for every component of
    every answer, a millisecond each; what `inspect` finds under this name it takes."""
    made = component.__dict__.get("__init__")
    while made is not None:
        made.__signature__ = inspect.signature(made)
        made = getattr(made, "__wrapped__", None)


def _render_nothing(*_: Any, **__: Any) -> None:
    pass


def write_no_stubs() -> None:
    """For a Gradio that is imported from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


@contextmanager
def page(title: str) -> Iterator["gr.Blocks"]:
    """A page to be filled within, with its queue, ready to be mounted."""
    import gradio as gr
    from gradio import blocks

    # To the type checker a class is no variable.
    module: Any = blocks
    usual, module.App = module.App, _NoApp
    try:
        with gr.Blocks(title=title, analytics_enabled=False) as found:
            yield found
            _report_to_nobody(found)
    finally:
        module.App = usual
    found.queue(default_concurrency_limit=_AT_ONCE)


def _report_to_nobody(page: "gr.Blocks") -> None:
    """Gradio tells every component that is any event's output how each event gets on, whether it shows that or not: a
    thousand searches of the page's tree an event, most of what a browser then has to do."""
    for function in page.fns.values():
        if function.show_progress == "hidden":
            function.show_progress_on = []


class _NoApp:
    @staticmethod
    def create_app(*_: Any, **__: Any) -> None:
        """None is asked for anything before the queue makes the one that stays."""
