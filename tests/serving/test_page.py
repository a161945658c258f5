"""The page at / in a browser: by keyboard, and by the names and roles of the accessibility tree."""

import re
import time

import pytest
import torch
from browsers import chromium
from model_folders import prose
from servers import PATIENCE, idle, served

import qlab
from qlab.serving.facts import facts_of

TEXT = prose(6)
MESSAGE = "Your message"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def directory(saved, tmp_path_factory):
    out = tmp_path_factory.mktemp("paged") / "out"
    qlab.quantize(saved("llama"), qlab.rtn("int8-channel"), None, out)
    return out


@pytest.fixture(scope="module")
def server(directory):
    with served(directory) as server:
        yield server


@pytest.fixture
def page(browser, server):
    """The page, of which no script failed."""
    page, failed = browser.new_page(), []
    page.set_default_timeout(1000 * PATIENCE)
    page.on("pageerror", lambda error: failed.append(error))
    page.goto(server.url)
    page.locator("#facts dd").first.wait_for()
    yield page
    page.close()
    assert not failed and idle(server)


def last(page):
    """The last message, when it is whole."""
    return page.get_by_role("listitem").last.and_(page.locator(":not([aria-busy])"))


def undrawn(page):
    """Sets the temperature to 0: a draw may end a reply at once."""
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0")


def slowed(monkeypatch, server, seconds=0.05):
    engine = server.worker.pipe.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(seconds), step()))


def test_a_talk_by_keyboard_alone(page, directory):
    page.evaluate(
        "window.grown = 0; new MutationObserver(seen => grown += seen.length)"
        ".observe(talk, { childList: true, subtree: true, characterData: true })"
    )
    seen = []
    for _ in range(4):
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    assert seen == ["text", "clear", "send", "SUMMARY"]  # there is nothing to stop
    page.get_by_text("Settings").press("Enter")
    for name, value in {"Temperature": "0", "Most tokens": "9", "System message": "word1"}.items():
        page.get_by_label(name).fill(value)
    page.get_by_label(MESSAGE).focus()
    page.keyboard.type(TEXT)
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("word2")
    page.keyboard.press("Enter")
    last(page).get_by_text("Model: ").wait_for()
    said = [("system", "word1"), ("user", f"{TEXT}\nword2")]
    chat = [{"role": role, "content": content} for role, content in said]
    with qlab.pipeline(directory, dtype=torch.float32) as pipe:
        expected = pipe(chat, temperature=0, max_tokens=9)
    assert last(page).text_content() == f"Model: {expected.text}"
    assert page.evaluate("grown") > 4  # it came in pieces
    rate = page.get_by_text(re.compile(r"^9 tokens · [\d.]+ tokens per second · first token"))
    rate.wait_for()


def test_what_a_screen_reader_finds(page, server):
    page.get_by_text("Settings").click()
    read = page.locator("body").aria_snapshot()
    for line in re.findall(r"- (?:button|textbox|spinbutton|form|log|main)\b.*", read):
        assert '"' in line, f"{line} has no name"
    for role, name in [("textbox", MESSAGE), ("log", "Messages"), ("spinbutton", "Top p")]:
        assert page.get_by_role(role, name=name).count() == 1
    assert page.get_by_role("log").get_attribute("aria-live") == "polite"
    facts = dict(
        zip(
            page.get_by_role("term").all_inner_texts(),
            page.get_by_role("definition").all_inner_texts(),
        )
    )
    known = facts_of(server.worker.pipe, "float32")
    assert facts["weights"] == known["scheme"] == "int8-channel"
    assert facts["kernels"] == known["kernels"] and facts["held in"].endswith(" bits")
    assert facts["memory"] == f"{known['weights_mib']:g} MiB"
    assert not page.get_by_role("button", name="Add image").is_visible()


def test_a_reply_is_stopped_and_the_talk_goes_on(page, server, monkeypatch):
    slowed(monkeypatch, server)
    undrawn(page)
    stop = page.get_by_role("button", name="Stop")
    for end in (stop.click, lambda: page.keyboard.press("Escape")):
        page.get_by_label(MESSAGE).fill(TEXT)
        page.keyboard.press("Enter")
        page.wait_for_function("messages.length && running && talk.lastChild.lastChild.textContent")
        end()
        last(page).wait_for()
        assert idle(server)
    roles = page.evaluate("messages.map(message => message.role)")
    assert roles == ["user", "assistant"] * 2
    page.get_by_role("button", name="New chat").click()
    assert page.evaluate("messages.length") == 0 and not page.get_by_role("listitem").count()


def test_what_is_refused_is_said_and_can_be_sent_again(page, server):
    page.get_by_label(MESSAGE).fill("word1 " * 200)
    page.keyboard.press("Enter")
    assert "at most 128" in page.get_by_text(re.compile("^Error: ")).locator("..").inner_text()
    assert page.get_by_label(MESSAGE).input_value() == ("word1 " * 200).strip()
    assert page.evaluate("messages.length") == 0


def test_a_reply_without_a_word_is_said_and_what_was_asked_is_kept(page):
    end = 'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=end))
    page.get_by_label(MESSAGE).fill(TEXT)
    page.keyboard.press("Enter")
    page.get_by_text("Error: the model ended its reply before its first word").wait_for()
    assert page.get_by_label(MESSAGE).input_value() == TEXT
    assert page.evaluate("messages.length") == 0


def test_what_was_asked_comes_back_where_the_reply_is_stopped_before_its_first_word(page):
    page.route("**/v1/chat/completions", lambda route: None)  # no answer
    for end, left in (("Stop", TEXT), ("New chat", "")):
        page.get_by_label(MESSAGE).fill(TEXT)
        with page.expect_request("**/v1/chat/completions"):
            page.keyboard.press("Enter")
        page.get_by_role("button", name=end).click()
        page.wait_for_function("!running")
        assert page.get_by_label(MESSAGE).input_value() == left
        assert page.evaluate("messages.length") == 0


def test_a_key_is_asked_for(browser, directory):
    with served(directory, keys=["sesame"]) as server:
        page = browser.new_page()
        page.goto(server.url)
        key = page.get_by_label("Key")
        key.and_(page.locator(":focus")).wait_for()
        assert "key is missing" in page.get_by_role("status").last.inner_text()
        key.fill("sesame")
        key.press("Tab")
        page.locator("#facts dd").first.wait_for()
        page.close()


def test_an_image_is_shown_to_a_model_that_takes_them(browser, llava):
    with served(llava) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_role("button", name="Add image").wait_for()
        page.locator("#file").set_input_files(llava / "1.png")
        page.get_by_text("images to send: 1").wait_for()
        undrawn(page)
        page.get_by_label(MESSAGE).fill("word5 word6")
        page.keyboard.press("Enter")
        page.get_by_role("img", name="the image you sent").wait_for()
        prompt = page.evaluate("messages[0].content.map(part => part.type)")
        page.close()
    assert prompt == ["image_url", "text"]
