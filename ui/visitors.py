"""Who a handler's request comes from: the role that the door let in."""

import gradio as gr

from ui.passwords import Role


def role(request: gr.Request | None) -> Role:
    """The visitor's role. A handler without a request (asked in a test, without a server) is taken for the reviewer's,
    who may do least."""
    inner = request.request if request is not None else None
    visit = inner.scope.get("katherine.visit") if inner is not None else None
    return visit.session.role if visit is not None and visit.session is not None else Role.reviewer
