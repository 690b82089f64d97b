"""The Space as a visitor uses it: served by Gradio, driven in a real browser."""

from __future__ import annotations

import json
import socket
import urllib.request

import pytest

gradio = pytest.importorskip("gradio", reason="Gradio is not installed (pip install 'dualstream[space]')")

FRAME = "document.querySelector('#words iframe')"
TABLE = "document.querySelector('#replies').innerText"


@pytest.fixture(scope="module")
def address():
    from dualstream.hub_cards.space.app import serve
    from dualstream.hub_cards.space.workbench import Workbench

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bench = Workbench(["tiny-llava", "tiny-qwen2-vl"])
    app, address, _ = serve(bench, server_name="127.0.0.1", server_port=port, quiet=True, prevent_thread_lock=True)
    yield address
    app.blocks.close()


@pytest.fixture
def page(chromium, address):
    chromium.resize(1400, 1000)
    chromium.open(address)
    chromium.wait("document.querySelector('#read') !== null && document.querySelector('#picture img') !== null")
    yield chromium
    assert chromium.requests and all(item.startswith(address) for item in chromium.requests)


def answers(page) -> str:
    page.click("#ask")
    return page.wait(f"{TABLE}.includes(' of ') && {TABLE}")


def choose(page, box: str, value: str) -> None:
    """Write into a drop-down list and leave it."""
    page.click(f"{box} input")
    page.run(f"document.querySelector('{box} input').select()")
    page.type(value)
    page.press("Enter")
    page.run("document.activeElement.blur()")  # or the next list opens over what is to be clicked
    page.settle()


def test_a_visitor_asks_and_gets_answers_with_and_without(page):
    text = answers(page)
    assert text.count(" of 64") == 4 and text.count("64 of 64") == 2
    assert text.count("tiny-qwen2-vl") == 2 and text.count("all tokens") == 2


def test_the_picture_is_read_into_a_page_that_works_inside_the_page(page):
    page.click("#read")
    page.wait(f"{FRAME} !== null")
    text = page.run(f"{FRAME}.getAttribute('srcdoc')")
    assert text.startswith("<!doctype html>") and "tiny-qwen2-vl" in text
    assert page.run(f"{FRAME}.getAttribute('sandbox')") == "allow-scripts"
    assert page.run(f"{FRAME}.contentDocument") is None, "it is another origin"


def test_scaling_a_model_without_rope_is_explained(page):
    page.click("#models label:nth-of-type(2) input")
    choose(page, "#scaling", "poly:99:8")
    page.click("#ask")
    page.wait("document.body.innerText.includes('no rotary vision tower')")


def test_another_scene_changes_the_picture_and_the_questions(page):
    picture = "document.querySelector('#picture img').src"
    before = page.run(picture), page.run("document.querySelector('#described').innerText")
    page.click("#surprise")
    page.wait(f"{picture} !== {before[0]!r}")
    page.wait(f"document.querySelector('#described').innerText !== {before[1]!r}")


def test_shapes_are_put_down_one_by_one(page):
    page.run(
        "[...document.querySelectorAll('button[role=tab]')].find((b) => b.innerText.includes('Shape by')).click()"
    )
    page.wait("document.querySelector('#clear') !== null && document.querySelector('#clear').offsetParent !== null")
    page.click("#clear")
    page.wait("document.querySelector('#described').innerText.includes('nothing yet')")
    page.click("#place")
    page.wait("document.querySelector('#described').innerText.includes('a solid blue star')")


def test_the_api_answers_too(address):
    with urllib.request.urlopen(f"{address}gradio_api/info") as reply:
        assert {"/ask", "/read"} <= set(json.loads(reply.read())["named_endpoints"])
