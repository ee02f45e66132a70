"""The control panel in the browser. Shows and asks; every operation is `katherine`'s or `jobs`'."""

from ui.startup import write_no_stubs

# Before any module of this package imports Gradio.
write_no_stubs()
