"""What the reader chose stays in the address: whatever older runs of the page do, and however old the browser's message is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit", reason="the dashboard's extra is not installed")
pytest.importorskip("plotly", reason="the dashboard's extra is not installed")

import margingate_dashboard
from dashboard_app import open_app
from streamlit.runtime.scriptrunner_utils.script_run_context import ScriptRunContext
from streamlit.testing.v1 import AppTest
from synthetic_runs import SyntheticSpec, write_run


def small_app() -> None:
    """A page that shows its step and its tokens, and whose callback writes both."""
    import streamlit as st
    from margingate_dashboard import address

    def older_run_begins() -> None:
        with st.session_state["context"].session_state.query_params() as params:
            params.populate_from_query_string("step=3&tokens=0")

    state = st.session_state
    with address.kept(state.get("page", "request")):
        if state.pop("older run", False):
            older_run_begins()
        with address.kept():  # a fragment, drawn with its page
            st.text(f"{address.get('step')} {address.get_all('tokens')}")
        st.button("next", on_click=address.write, kwargs={"step": "24", "tokens": None, "picked": ("1", "2")})
        if state.pop("newer run", False):
            address.write(step="31")
        if state.pop("stopped", False):
            st.stop()


@pytest.fixture
def older_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Query strings of older runs that begin between the callbacks of the next run and its body: Streamlit's own reset."""
    waiting: list[str] = []
    begin = ScriptRunContext.on_script_start

    def begin_beside(context: ScriptRunContext) -> None:
        context.session_state["context"] = context
        if waiting:
            with context.session_state.query_params() as params:
                params.populate_from_query_string(waiting.pop())
        begin(context)

    monkeypatch.setattr(ScriptRunContext, "on_script_start", begin_beside)
    return waiting


@pytest.fixture
def at(older_run: list[str]) -> AppTest:
    app = AppTest.from_function(small_app, default_timeout=60)
    ask(app)
    assert shown(app) == "3 ['0']"
    return app


def ask(app: AppTest) -> None:
    """Run the page for a browser that knows the old address."""
    app.query_params = {"step": "3", "tokens": "0"}
    app.run()
    assert not app.exception


def shown(app: AppTest) -> str:
    return app.text[0].value


def test_an_older_run_that_begins_after_a_callback_takes_nothing_away(at: AppTest, older_run: list[str]) -> None:
    older_run.append("step=3&tokens=0")
    at.button[0].click().run()
    assert not older_run, "it began"
    assert shown(at) == "24 []"
    assert at.query_params == {"step": "24", "picked": ["1", "2"]}, "the browser is told as well"


def test_an_older_run_that_begins_in_the_middle_of_a_page_takes_nothing_away(at: AppTest) -> None:
    at.session_state["older run"] = True
    at.button[0].click().run()
    assert "older run" not in at.session_state, "it began"
    assert shown(at) == "24 []"
    assert at.query_params == {"step": "24", "picked": ["1", "2"]}


def test_what_an_interrupted_run_wrote_is_shown_by_the_next(at: AppTest) -> None:
    at.session_state["stopped"] = True
    at.button[0].click().run()
    assert "stopped" not in at.session_state
    ask(at)
    assert shown(at) == "24 []"
    assert at.query_params == {"step": "24", "picked": ["1", "2"]}


def test_back_leads_back_once_a_run_has_ended(at: AppTest) -> None:
    at.button[0].click().run()
    assert shown(at) == "24 []"
    ask(at)
    assert shown(at) == "3 ['0']"


def test_what_was_written_on_another_page_is_dropped(at: AppTest) -> None:
    at.session_state["stopped"] = True
    at.button[0].click().run()
    at.session_state["page"] = "requests"
    ask(at)
    assert shown(at) == "3 ['0']"
    at.session_state["page"] = "request"
    ask(at)
    assert shown(at) == "3 ['0']", "nor does it come back with its page"


def test_a_run_forgets_only_what_it_knew(at: AppTest) -> None:
    at.session_state["newer run"] = True
    at.button[0].click().run()
    assert shown(at) == "24 []"
    assert at.query_params["step"] == "31"
    ask(at)
    assert shown(at) == "31 ['0']", "written after that run began: the tokens, which it knew, are forgotten"
    ask(at)
    assert shown(at) == "3 ['0']"


def request_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    write_run(folder / "a", SyntheticSpec(requests=12, tokens=80, policy="always", perturbation=0.4))
    app = open_app(folder, monkeypatch).run()
    return app.switch_page("request.py").run()


def step_box(app: AppTest) -> Any:
    (box,) = (b for b in app.number_input if b.label == "Step")
    return box


def step_of(app: AppTest) -> tuple[Any, str]:
    """Return the step that the page shows as selected, and that of its address."""
    assert not app.exception
    box = step_box(app)
    tokens = re.findall(
        r'class="t[^"]*\bsel\b[^"]*"[^>]*data-step="(\d+)"', "".join(h.proto.body for h in app.get("html"))
    )
    assert tokens == ([] if box.value is None else [str(box.value)])
    return box.value, "".join(app.query_params.get("step", ""))


def button(app: AppTest, label: str) -> Any:
    return next(b for b in app.button if b.label == label)


def test_a_flip_is_selected_although_an_older_run_of_the_page_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older_run: list[str]
) -> None:
    app = request_page(tmp_path, monkeypatch)
    button(app, "Next flip").click().run()
    flip, written = step_of(app)
    assert str(flip) == written
    for _ in range(2):
        older_run.append(f"run=a&step={flip}")
        button(app, "Next flip").click().run()
        later, written = step_of(app)
        assert later > flip
        assert str(later) == written
        flip = later


def test_a_message_older_than_the_page_selects_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = request_page(tmp_path, monkeypatch)
    older = app._tree.get_widget_states()  # what the browser knows of the page
    app.query_params["step"] = "3"
    app.run()
    assert step_of(app) == (3, "3")
    app._run(older)
    assert step_of(app) == (3, "3"), "the box of the older page says that no step is selected, and nobody typed it"
    (pressed,) = (w for w in older.widgets if w.id == button(app, "Next flip").proto.id)
    pressed.trigger_value = True
    app._run(older)
    flip, written = step_of(app)
    assert flip > 3
    assert str(flip) == written
    step_box(app).set_value(7).run()
    assert step_of(app) == (7, "7"), "what is typed counts"
    step_box(app).set_value(None).run()
    assert step_of(app) == (None, ""), "and an emptied box"


def test_nothing_else_reads_or_writes_the_address() -> None:
    room = Path(str(margingate_dashboard.__file__)).parent
    files = {file.name for file in room.rglob("*.py") if re.search(r"\bst\.query_params\b", file.read_text())}
    assert files == {"address.py"}
