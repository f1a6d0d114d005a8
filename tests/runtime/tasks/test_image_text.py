"""LLaVA's usual recipe, a fully trained projector and LoRA on the decoder, in two bundles.

The reference is transformers with PEFT. The two parts of an adapter always run together.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from safetensors.numpy import load_file, save_file

import loradeploy as ld
from loradeploy.adapter import load_adapter
from loradeploy.errors import UsageError
from tests.cli.calling import call
from tests.conftest import once
from tests.export.reference import difference
from tests.inputs.edits import edited_json
from tests.inputs.vision_language import (
    NEW,
    generated_by_model,
    make_family,
    outputs_of_bundles,
    outputs_of_model,
    processed_ids,
    prompt_ids,
    random_images,
)
from tests.tolerances import tolerance

LLAVA: Final = "Llava"
PROMPT: Final = "w1 w13 <image> w9"
TOKENS: Final = 16  # tokens per image
WEIGHTS: Final = "adapter_model.safetensors"


@dataclass(frozen=True)
class Made:
    """The checkpoint, two adapters of the recipe, and the decoder part of the first one.

    The bundles have the adapters as side inputs, each under its name.
    """

    place: Path
    model: Path

    def adapter(self, name: str) -> Path:
        return self.place / name

    @property
    def decoder(self) -> Path:
        return self.place / "decoder"

    @property
    def tower(self) -> Path:
        return self.place / "tower"

    def sessions(self) -> tuple[ld.AdapterSession, ld.AdapterSession]:
        return ld.AdapterSession(self.decoder), ld.AdapterSession(self.tower)


def _train(model: Path, output: Path, seed: int) -> None:
    """Train an adapter with a full projector and factors on the decoder."""
    import peft
    import torch
    from transformers import AutoModelForImageTextToText

    options = peft.LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)",
        modules_to_save=["multi_modal_projector"],
        task_type="CAUSAL_LM",
    )
    base = AutoModelForImageTextToText.from_pretrained(model)
    made = peft.get_peft_model(base, options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    made.save_pretrained(output)


def _text_alone(adapter: Path, output: Path) -> None:
    """Write the decoder part of the adapter, as if trained without the projector."""
    shutil.copytree(adapter, output)
    tensors = load_file(adapter / WEIGHTS)
    save_file({n: v for n, v in tensors.items() if "projector" not in n}, output / WEIGHTS)
    file = output / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modules_to_save": None}))


def _prepare(model: Path, place: Path) -> None:
    for seed, name in enumerate(("charts", "maps")):
        _train(model, place / name, seed)
    _text_alone(place / "charts", place / "words")
    both = {name: place / name for name in ("charts", "maps")}
    ld.export(
        model, place / "decoder", task="causal-lm", adapters={**both, "words": place / "words"}
    )
    ld.export(model, place / "tower", task="vision-tower", adapters=both)


@pytest.fixture(scope="session")
def made(shared: Path) -> Made:
    model = once(shared / f"images-{LLAVA}", lambda place: make_family(LLAVA, place)) / "model"
    place = once(shared / "images-recipe", lambda place: _prepare(model, place))
    return Made(place, model)


def _logits(made: Made, name: str | None) -> Any:
    adapter = None if name is None else made.adapter(name)
    return outputs_of_model(LLAVA, made.model, adapter, random_images(), prompt_ids(TOKENS))


def _text(made: Made, name: str | None, image: Any = None) -> list[int]:
    """Return greedy tokens of transformers with PEFT, for the first image unless one is given."""
    ids = processed_ids(LLAVA, PROMPT, TOKENS)
    adapter = None if name is None else made.adapter(name)
    shown = random_images()[0] if image is None else image
    return list(generated_by_model(LLAVA, made.model, adapter, shown, ids))


def _answers(generator: ld.ImageTextGenerator, *names: str | None) -> list[list[int]]:
    count = len(names)
    given: Any = [[random_images()[0]]] * count
    results = generator.generate([PROMPT] * count, given, list(names), max_new_tokens=NEW)
    return [list(result.token_ids) for result in results]


def test_a_trained_projector_and_factors_give_the_text_of_the_whole_model(made: Made) -> None:
    decoder, tower = made.sessions()
    expected = {name: _logits(made, name) for name in (None, "charts", "maps", "words")}
    allowed = tolerance("torch-onnx-tiny")
    for name in expected:
        sees = None if name == "words" else name
        found = outputs_of_bundles(tower, decoder, random_images(), sees, name)
        assert difference(found, expected[name]) <= allowed, name
        others = [expected[other] for other in expected if other != name]
        assert min(difference(found, other) for other in others) > 100 * allowed, name
    for sees, reads in (("charts", None), (None, "charts"), ("maps", "charts")):
        found = outputs_of_bundles(tower, decoder, random_images(), sees, reads)
        assert difference(found, expected["charts"]) > 100 * allowed, "each part counts"

    generator = ld.ImageTextGenerator(decoder, tower)
    images = [*random_images(), *random_images(1), *random_images(2)]
    texts = {name: [_text(made, name, image) for image in images] for name in expected}
    for name, own in texts.items():
        prompts, given = [PROMPT] * len(images), [[image] for image in images]
        results = generator.generate(prompts, given, name, max_new_tokens=NEW)
        assert [list(result.token_ids) for result in results] == own, name
        assert all(own != text for other, text in texts.items() if other != name), name


def test_run_refuses_a_row_without_its_image(made: Made, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "What is this?", "images": ["cat.png"]}))
    with pytest.raises(
        UsageError,
        match="rows.jsonl, line 1: images: .* is the decoder of a vision-lang.* give --vision",
    ):
        call("run", made.decoder, "--input", rows, "--max-new-tokens", 2)
    rows.write_text(json.dumps({"prompt": "What is this?", "images": []}))
    call("run", made.decoder, "--input", rows, "--max-new-tokens", 2)


def test_parity_of_a_part_without_factors_skips_peft(made: Made) -> None:
    report = ld.parity(made.tower, model=made.model, certificate=False)
    assert report.passed, report.failures
    left = {found.backend: found.message for found in report.results if found.outcome == "not run"}
    assert left["peft"] == "PEFT cannot load charts, an adapter without factors"


def test_the_recipe_merged_into_both_bundles_gives_the_text_of_the_whole_model(
    made: Made, tmp_path: Path
) -> None:
    charts = made.adapter("charts")
    whole = load_adapter(charts).digest
    # The decoder's part from its bundle, and the whole adapter: both are the same adapter.
    sources = {"decoder": made.decoder / "adapters" / "charts", "tower": charts}
    for part, source in sources.items():
        bundle = made.place / part
        manifest = ld.export(bundle, tmp_path / part, adapters={"charts": source}, merge=True)
        assert manifest.merged_adapter is not None
        assert manifest.merged_adapter.digest == load_adapter(source).digest
        assert (manifest.merged_adapter.whole_digest, manifest.merged_adapter.split) == (
            whole,
            True,
        )
    decoder, tower = (ld.AdapterSession(tmp_path / part) for part in sources)
    found = outputs_of_bundles(tower, decoder, random_images())
    assert difference(found, _logits(made, "charts")) <= tolerance("torch-onnx-tiny")
    assert _answers(ld.ImageTextGenerator(decoder, tower), None) == [_text(made, "charts")]

    # One part merged, the other as side inputs: works with the name, and only with it.
    _, sides = made.sessions()
    generator = ld.ImageTextGenerator(decoder, sides)
    assert _answers(generator, "charts") == [_text(made, "charts")]
    with pytest.raises(
        UsageError, match="runs the base without an adapter: give its name there, 'ch"
    ):
        _answers(generator, None)
    with pytest.raises(UsageError, match="has another adapter merged than 'maps' of"):
        _answers(generator, "maps")
    sides.unload("charts")
    with pytest.raises(
        UsageError, match=r"has an adapter merged \(.*\) that changes .* too, which"
    ):
        ld.ImageTextGenerator(decoder, sides)


def test_a_manifest_records_the_whole_adapters_of_its_parts(made: Made) -> None:
    decoder, tower = (session.manifest for session in made.sessions())
    for name in ("charts", "maps"):
        whole = load_adapter(made.adapter(name)).digest
        for manifest in (decoder, tower):
            entry = manifest.adapters[name]
            assert (entry.whole_digest, entry.split) == (whole, True)
            assert entry.digest != whole
        part = load_adapter(made.decoder / "adapters" / name)
        assert (part.part_of, part.digest) == (whole, decoder.adapters[name].digest)
    entry = decoder.adapters["words"]
    assert (entry.whole_digest, entry.split) == (load_adapter(made.adapter("words")).digest, False)


def test_one_name_for_two_trainings_is_refused(made: Made, tmp_path: Path) -> None:
    given = {"charts": made.adapter("maps")}
    ld.export(made.tower, tmp_path / "tower", adapters=given)
    decoder, other = ld.AdapterSession(made.decoder), ld.AdapterSession(tmp_path / "tower")
    with pytest.raises(UsageError, match="'charts' stands for two adapters, .* export both with"):
        ld.ImageTextGenerator(decoder, other)
    other.load("charts", made.adapter("charts"), replace=True)
    generator = ld.ImageTextGenerator(decoder, other)
    assert _answers(generator, "charts") == [_text(made, "charts")]

    decoder.load("late", made.adapter("charts"))
    with pytest.raises(UsageError, match=r"'late' is not in .* has only its own part of it"):
        _answers(generator, "late")
    other.load("late", made.adapter("maps"))
    with pytest.raises(UsageError, match="'late' stands for two adapters"):
        _answers(generator, "late")
    other.register("late", made.adapter("maps"), replace=True)
    with pytest.raises(UsageError, match="'late' stands for two adapters"):
        _answers(generator, "late")
    other.load("late", made.tower / "adapters" / "charts", replace=True)
    assert _answers(generator, "late", "words") == [_text(made, n) for n in ("charts", "words")]


def test_bundles_of_earlier_formats_run_as_before(made: Made, tmp_path: Path) -> None:
    bundles = [
        shutil.copytree(bundle, tmp_path / bundle.name) for bundle in (made.decoder, made.tower)
    ]
    for bundle in bundles:
        file = bundle / "loradeploy.json"
        with edited_json(file) as manifest:
            for entry in manifest["adapters"].values():
                del entry["whole_digest"], entry["split"]
    generator = ld.ImageTextGenerator(*(ld.AdapterSession(bundle) for bundle in bundles))
    assert _answers(generator, "charts") == [_text(made, "charts")]
    with pytest.raises(UsageError, match="the adapter 'words' is not in .*tower: `load` it"):
        _answers(generator, "words")
