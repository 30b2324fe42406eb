"""The chat page in a real browser, asked by keys and clicks as a person would."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from api import KEY, NAME, served, slow_and_endless
from browser import CHROMIUM, Page, look
from taught import LETTERS, SUM, taught

from corpus.tokenizers import DOCUMENT_ENDS, Tokenizer
from models.hf import from_pretrained
from serving.torch_api import TorchApi
from stages.training.state import export

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")
IDLE = "working === null && model !== null"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("taught")
    taught(path)
    return path


@pytest.fixture(scope="module")
def engine(model: Path) -> TorchApi:
    return TorchApi(model, NAME, on_gpu=False)


async def opened(page: Page, url: str, width: int = 1_000) -> None:
    """The page with answers that are the likeliest."""
    await page.open(f"{url}/", width)
    await page.until(IDLE)
    await page.says("kept.settings.temperature = 0")


async def asked(page: Page, text: str) -> None:
    await page.says("$('text').focus()")
    await page.type(text)
    await page.press("Enter")
    await page.until(IDLE)


async def texts(page: Page) -> list[str]:
    found: list[str] = await page.says("[...document.querySelectorAll('.said')].map(each => each.textContent)")
    return found


def check(page: Page, url: str) -> None:
    """It complained of nothing, and asked nobody else."""
    assert page.complaints == []
    assert all(address.startswith((f"{url}/", "data:")) for address in page.asked), page.asked


def test_a_conversation_is_had_kept_and_gone_back_in(engine: TorchApi) -> None:
    """Asked by Enter, with the calculator's call shown; edited, retried, found again after a reload, and left for
    another one."""
    with served(engine, key=None) as url:

        async def act(page: Page) -> None:
            await opened(page, url)
            await asked(page, "letters?")
            assert await texts(page) == ["letters?", LETTERS]
            await page.says("[...document.querySelectorAll('.acts button')].find(b => b.textContent == 'Edit').click()")
            assert await page.says("$('text').value") == "letters?"
            await page.says("$('text').select()")
            await asked(page, SUM)
            assert await texts(page) == [SUM, "So 12*34 = 408#### 408"]
            assert await page.says("document.querySelector('.call').textContent") == "12*34 = 408"
            await page.says(
                "[...document.querySelectorAll('.acts button')].find(b => b.textContent == 'Retry').click()"
            )
            await page.until(IDLE)
            assert await texts(page) == [SUM, "So 12*34 = 408#### 408"]
            await page.says("$('new').click()")
            await page.type("a draft")
            await opened(page, url)
            assert await texts(page) == [] and await page.says("$('text').value") == "a draft"
            await page.says("document.querySelectorAll('nav li button:first-child')[1].click()")
            assert await texts(page) == [SUM, "So 12*34 = 408#### 408"]
            await page.says("$('text').focus()")
            await page.press("ArrowUp")
            assert await page.says("$('text').value") == SUM, "the last question is edited"
            check(page, url)

        look(act)


def test_an_answer_streams_and_is_stopped(engine: TorchApi, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_and_endless(engine, monkeypatch, 0.1)
    with served(engine, key=None) as url:

        async def act(page: Page) -> None:
            await opened(page, url)
            await page.type("letters?")
            await page.press("Enter")
            await page.until("document.querySelectorAll('.said')[1]?.textContent.length > 2")
            assert await page.says("working !== null && !$('stop').hidden && $('send').hidden")
            await page.press("Escape")
            await page.until(IDLE)
            said = (await texts(page))[1]
            assert LETTERS.startswith(said) and "(stopped)" in await page.says("$('log').textContent")
            check(page, url)

        look(act)


def test_an_error_is_shown_and_nothing_typed_is_lost(engine: TorchApi) -> None:
    """A key that is missing is asked for; with it the page goes on. What is too long is told, and stays to be edited;
    so is a server that is gone."""

    async def act(page: Page) -> None:
        with served(engine, KEY) as url:
            await page.open(f"{url}/", 1_000)
            await page.until("$('options').open")
            assert "API key is needed" in await page.says("$('error').textContent")
            await page.says(f"$('key').value = '{KEY}'; document.querySelector('dialog .main').click()")
            await page.until(IDLE)
            await page.says("kept.settings.temperature = 0")
            long = "qwertyzxk " * 60
            await asked(page, long)
            assert "the context of the model is" in await page.says("$('error').textContent")
            assert await texts(page) == [long]
        await page.says("[...document.querySelectorAll('.acts button')].find(b => b.textContent == 'Retry').click()")
        await page.until(IDLE)
        assert "cannot be reached" in await page.says("$('error').textContent")
        assert await texts(page) == [long]

    look(act)


@pytest.mark.parametrize("width", [390, 1_400])
def test_it_fits_a_phone_and_names_everything(engine: TorchApi, width: int) -> None:
    """Nothing is wider than the screen, and what can be used has a name for those who do not see it."""
    with served(engine, key=None) as url:

        async def act(page: Page) -> None:
            await opened(page, url, width)
            await asked(page, "hostile? " + "w" * 60)
            await asked(page, "letters?")
            assert await page.says("document.documentElement.scrollWidth <= innerWidth")
            if width < 500:
                assert await page.says("getComputedStyle($('list')).display") == "none"
                await page.says("$('menu').click()")
            assert await page.says("getComputedStyle($('list')).display") != "none"
            await page.says("$('settings').click()")
            assert await page.says("document.documentElement.scrollWidth <= innerWidth")
            tree = (await page.call("Accessibility.getFullAXTree"))["nodes"]
            used = [node for node in tree if node.get("role", {}).get("value") in ("button", "textbox", "spinbutton")]
            assert len(used) > 4 and all(node["name"]["value"] for node in used if not node.get("ignored"))
            check(page, url)

        look(act)


def test_for_a_base_model_it_is_a_text_to_go_on_with(model: Path, tmp_path: Path) -> None:
    export(from_pretrained(model), Tokenizer.load(model), tmp_path, DOCUMENT_ENDS)
    with served(TorchApi(tmp_path, NAME, on_gpu=False), key=None) as url:

        async def act(page: Page) -> None:
            await opened(page, url)
            assert await page.says("$('list').hidden")
            await page.type("Tom buys")
            await page.says("$('send').click()")
            await page.until(IDLE)
            text = await page.says("$('text').value")
            assert text.startswith("Tom buys") and len(text) > len("Tom buys"), text
            await opened(page, url)
            assert re.sub(r"\r\n?", "\n", await page.says("$('text').value")) == text
            check(page, url)

        look(act)
