"""Chat requests with images, by the official client: the texts of transformers, and refusals."""

from __future__ import annotations

import base64
import shutil
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from loradeploy.bundle.image.opening import EncodedImage
from loradeploy.errors import BundleError, UsageError
from loradeploy.serve.opening import ServiceSpec
from tests.cli.calling import call
from tests.inputs.pictures import NEW, Made, prepared
from tests.serve.answers import connection, until
from tests.serve.conftest import Running, serving


@pytest.fixture(scope="module")
def made(shared: Path) -> Made:
    return prepared(shared, "Gemma3")


@pytest.fixture(scope="module")
def server(made: Made) -> Iterator[Running]:
    adapters = {name: made.place / name for name in ("text", "vision")}
    options: dict[str, Any] = {"vision": made.place / "tower", "adapters": adapters}
    with serving(made.place / "decoder", max_images=2, max_image_pixels=3000, **options) as running:
        yield running


def part(url: str | Path) -> dict[str, Any]:
    if isinstance(url, Path):
        url = f"data:image/png;base64,{base64.b64encode(url.read_bytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def conversation(*parts: Any) -> Any:
    content = [{"type": "text", "text": one} if isinstance(one, str) else one for one in parts]
    return [{"role": "user", "content": content}]


def ask(server: Running, model: str, messages: Any, **options: Any) -> Any:
    return server.client().chat.completions.create(
        model=model, messages=messages, max_tokens=NEW, temperature=0, **options
    )


def text_of(made: Made, prompt: str, pictures: list[Path], adapter: str | None) -> str:
    from transformers import AutoTokenizer

    tokens = made.greedy(prompt, pictures, adapter)
    text: str = AutoTokenizer.from_pretrained(made.place / "model").decode(
        tokens, skip_special_tokens=True
    )
    return text


def test_answers_about_images_are_those_of_the_whole_model(
    server: Running, made: Made, pictures: list[Path]
) -> None:
    messages = conversation(part(pictures[0]), "w20 w21", part(pictures[1]))
    prompt = "user\n<start_of_image>w20 w21<start_of_image>\n"
    answers = {}
    for model, adapter in (
        ("decoder", None),
        ("all", "all"),
        ("text", "text"),
        ("vision", "vision"),
    ):
        found = ask(server, model, messages)
        answers[model] = found.choices[0].message.content
        assert answers[model].split() == text_of(made, prompt, pictures[:2], adapter).split(), model
        tokens = made.given(prompt, pictures[:2])["input_ids"].shape[1]
        assert found.usage.prompt_tokens == tokens
        assert found.usage.prompt_tokens_details.cached_tokens == 0
    assert answers["decoder"] != answers["all"] != answers["text"]
    pieces = ask(server, "all", messages, stream=True)
    streamed = [choice.delta.content or "" for chunk in pieces for choice in chunk.choices]
    assert "".join(streamed) == answers["all"]
    alone = ask(server, "vision", conversation("w20 w21")).choices[0].message.content
    assert alone == ask(server, "decoder", conversation("w20 w21")).choices[0].message.content
    assert {model.id for model in server.client().models.list()} == {
        *("decoder", "all", "text", "vision")
    }


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.com/a.png", "image 1: give a data: URL .* this service fetches nothing"),
        ("file:///etc/passwd", "image 1: give a data: URL"),
        ("/etc/passwd", "image 1: give a data: URL"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "image 1: give a data: URL"),
        ("data:text/plain;base64,aGk=", "image 1: give a data: URL"),
        ("data:image/png;base64,§", "image 1 is not base64"),
        ("data:image/png;base64,aGk=", "image 1 cannot be read as an image"),
        ("data:image/png;base64,", "image 1 cannot be read as an image"),
    ],
)
def test_other_urls_and_other_content_are_refused(url: str, message: str, server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(server, "decoder", conversation(part(url), "w5"))


def test_limits_and_misplaced_images_are_refused(
    server: Running, made: Made, pictures: list[Path], tmp_path: Path
) -> None:
    from PIL import Image

    with pytest.raises(openai.BadRequestError, match="3 images; this service takes 2"):
        ask(server, "decoder", conversation(*[part(pictures[0])] * 3))
    large = tmp_path / "large.png"
    Image.new("RGB", (60, 60)).save(large)
    with pytest.raises(openai.BadRequestError, match="60 x 60 pixels, more than the 3,000"):
        ask(server, "decoder", conversation(part(large)))
    with pytest.raises(openai.BadRequestError, match="prompt 1 has 10 image tokens|has .* image"):
        ask(server, "decoder", conversation(part(pictures[0]), "w5 <start_of_image>"))
    with pytest.raises(openai.BadRequestError, match="detail of an image is 'low'"):
        low = part(pictures[0])
        low["image_url"]["detail"] = "low"
        ask(server, "decoder", conversation(low))
    with pytest.raises(openai.BadRequestError, match="blends of adapters are not supported"):
        blend = {"adapters": {"text": 0.5, "all": 0.5}}
        ask(server, "decoder", conversation(part(pictures[0])), extra_body=blend)
    refused = pytest.raises(openai.BadRequestError, match="it has no vision tower")
    with serving(made.place / "decoder") as without, refused:
        ask(without, "decoder", conversation(part(pictures[0])))


def test_one_image_of_a_request_is_decoded_at_a_time(
    server: Running, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, alive = EncodedImage.decoded, list[weakref.ref[Any]]()

    def counted(image: EncodedImage) -> Any:
        assert not any(ref() is not None for ref in alive), "an earlier image is in memory"
        alive.append(weakref.ref(found := decoded(image)))
        return found

    monkeypatch.setattr(EncodedImage, "decoded", counted)
    messages = conversation(part(pictures[0]), "w20 w21", part(pictures[1]))
    assert ask(server, "all", messages).choices[0].message.content
    assert len(alive) == 2


def test_images_of_a_client_that_disconnects_are_not_read(
    server: Running, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    vision: Any = server.service.vision
    read, began, released = vision._read, threading.Event(), threading.Event()
    prompts = []

    def held(prompt: Any, *given: Any) -> Any:
        prompts.append(prompt)
        began.set()
        assert released.wait(60)
        return read(prompt, *given)

    monkeypatch.setattr(vision, "_read", held)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, server, "decoder", conversation(part(pictures[0]), "w5"))
        assert began.wait(60)
        body = {"model": "decoder", "messages": conversation(part(pictures[0]), "w6")}
        client = connection(server, body, "/v1/chat/completions")
        until(lambda: vision.waiting == 2)
        client.close()
        until(lambda: vision.waiting == 1)
        released.set()
        assert first.result(60).choices[0].message.content
    until(lambda: vision.waiting == 0)
    assert len(prompts) == 1
    figures = server.http().get("/metrics").text
    assert 'http_responses_total{status="503"}' not in figures


def test_a_missing_part_of_an_adapter_is_in_the_log_and_not_in_the_answer(
    made: Made, pictures: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with serving(made.place / "decoder", vision=made.place / "tower") as running:
        vision: Any = running.service.vision
        vision.generator.tower.unload("all")
        body = {"model": "all", "messages": conversation(part(pictures[0]), "w5")}
        answer = running.http().post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "adapter_load_failed")
    assert str(made.place) not in answer.text
    assert "the adapter 'all' is not in" in caplog.text and str(made.place) in caplog.text


def test_a_tower_without_settings_for_images_is_refused_when_the_service_starts(
    made: Made, tmp_path: Path
) -> None:
    tower = tmp_path / "tower"
    shutil.copytree(made.place / "tower", tower)
    for file in tower.glob("*processor_config.json"):
        file.unlink()
    with pytest.raises(BundleError, match=r"tower has no preprocessor_config\.json"):
        call("serve", made.place / "decoder", "--vision", tower, "--port", 0)


def test_settings_that_cannot_be_combined_are_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`adapter_root`: not supported with `vision`"):
        ServiceSpec("decoder", vision="tower", adapter_root=str(tmp_path))
    with pytest.raises(UsageError, match="--vision: not supported with --ray"):
        call("serve", made.place / "decoder", "--vision", made.place / "tower", "--ray")
    with pytest.raises(UsageError, match="is a causal-lm bundle, no vision-tower"):
        call("serve", made.place / "decoder", "--vision", made.place / "decoder", "--port", 0)
