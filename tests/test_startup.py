"""What Gradio is kept from while the panel starts, and that it is no less Gradio for it."""

import subprocess
import sys
from pathlib import Path

import gradio as gr
from gradio import component_meta, routes

from katherine.settings import PROJECT, Home
from ui import operator, review, startup
from ui.panel import Panel


def test_importing_the_panel_writes_nothing_beside_gradios_source():
    """In a process of its own: what this one has imported stays imported."""
    told = (
        "import ui, gradio.component_meta as m, gradio as gr; "
        "print(m.create_or_modify_pyi.__module__, hasattr(gr.Textbox, 'submit'), "
        "'label' in vars(gr.Textbox.__init__)['__signature__'].parameters)"
    )
    found = subprocess.run([sys.executable, "-c", told], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["ui.startup", "True", "True"]


def test_the_hook_is_there_once_and_touches_no_other_module():
    startup.write_no_stubs()
    startup.write_no_stubs()
    finders = [finder for finder in sys.meta_path if isinstance(finder, startup._Finder)]
    assert len(finders) == 1
    assert finders[0].find_spec("gradio.blocks", gr.__path__) is None
    assert Path(component_meta.__file__).is_file()


def test_a_page_has_a_queue_and_one_app_until_it_is_mounted(monkeypatch):
    made = []
    usual = routes.App.create_app
    monkeypatch.setattr(routes.App, "create_app", staticmethod(lambda *a, **k: made.append(1) or usual(*a, **k)))
    with startup.page("A page") as page:
        field = gr.Textbox()
        field.submit(str.upper, field, field)
    assert len(made) == 1 and page.app is not None and page._queue.default_concurrency_limit == startup._AT_ONCE
    with gr.Blocks():
        pass
    assert len(made) == 3, "elsewhere Gradio does as it always does"


def test_only_events_whose_progress_shows_are_reported_to_components(tmp_path):
    with startup.page("A page") as page:
        field = gr.Textbox()
        field.submit(str.upper, field, field)
        field.blur(str.lower, field, field, show_progress="hidden")
    told = {dep["targets"][0][1]: dep["show_progress_on"] for dep in page.get_config_file()["dependencies"]}
    assert told == {"submit": None, "blur": []}
    for build in (operator.build, review.build):
        made = build(Panel.of(Home(tmp_path)))
        hidden = [dep for dep in made.get_config_file()["dependencies"] if dep["show_progress"] == "hidden"]
        assert len(hidden) > 3 and all(dep["show_progress_on"] == [] for dep in hidden)
