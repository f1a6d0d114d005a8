"""Encoder-decoders: two graphs with one set of weights, and the text of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

import loradeploy as ld
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import BudgetError, BundleError, UsageError
from loradeploy.runtime.decoding.caches.memory import row_bytes
from loradeploy.runtime.engine.engine import Engine
from tests.cli.calling import call
from tests.conftest import MakeAdapter, once
from tests.tolerances import tolerance

TEXTS = ["Shares rose", "The striker scored twice in the final", "A film"]
ROWS = ["first", None, "second"]
SETTINGS = [
    {},
    {"num_beams": 3},
    {"num_beams": 4, "length_penalty": 0.4, "early_stopping": True},
    {"num_beams": 3, "no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.7},
]
SIZES = (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))


@pytest.fixture(scope="module")
def adapters(tiny_t5: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    """Two adapters of different ranks on every linear layer of encoder and decoder."""
    return {
        name: make_adapter(tiny_t5, task="seq2seq-lm", r=rank, seed=rank, scale=0.2)
        for name, rank in (("first", 2), ("second", 4))
    }


@pytest.fixture(scope="module")
def bundle(tiny_t5: Path, adapters: dict[str, Path], shared: Path) -> Path:
    """A bundle of the tiny T5 with both adapters."""
    return once(shared / "seq2seq", lambda place: ld.export(tiny_t5, place, adapters=adapters))


@pytest.fixture(scope="module")
def generator(bundle: Path) -> ld.TextGenerator:
    return ld.TextGenerator(ld.AdapterSession(bundle))


def expected(model: Path, adapter: Path | None, text: str, **settings: Any) -> list[int]:
    """Return the tokens that transformers and PEFT generate for a text, up to the end token."""
    import peft
    import torch
    import transformers

    made: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(model)
    if adapter is not None:
        made = peft.PeftModel.from_pretrained(made, adapter)
    ids = transformers.AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        out = made.eval().generate(
            input_ids=ids, max_new_tokens=10, do_sample=False, **{"num_beams": 1, **settings}
        )
    made_of = out[0].tolist()[1:]
    return made_of[: made_of.index(2)] if 2 in made_of else made_of


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_row_generates_the_same_as_transformers_with_its_adapter(
    settings: dict[str, Any],
    generator: ld.TextGenerator,
    tiny_t5: Path,
    adapters: dict[str, Path],
) -> None:
    answers = generator.generate(TEXTS, ROWS, max_new_tokens=10, **settings)
    for text, name, answer in zip(TEXTS, ROWS, answers, strict=True):
        adapter = None if name is None else adapters[name]
        assert list(answer.token_ids) == expected(tiny_t5, adapter, text, **settings)
    one = generator.generate([TEXTS[0]] * 3, ROWS, max_new_tokens=10, **settings)
    assert len({answer.token_ids for answer in one}) == 3, "each adapter's effect is seen"


BART = {
    "d_model": 32,
    "init_std": 0.4,
    "max_position_embeddings": 128,
    **{f"{half}_{what}": size for half in ("encoder", "decoder") for what, size in SIZES},
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
T5 = {"d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "initializer_factor": 1.5}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
GEMMA = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
GEMMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64}
GEMMA |= {"initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
# Models with learned or sinusoidal positions, biases, other end tokens, gated layers, heads apart.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("BartConfig", BART),
    "blenderbot": ("BlenderbotConfig", BART),
    "flan-t5": ("T5Config", {**T5, **GATED}),
    "m2m_100": ("M2M100Config", {**BART, "scale_embedding": True}),
    "marian": ("MarianConfig", {**BART, "scale_embedding": True, "decoder_start_token_id": 1}),
    "mbart": ("MBartConfig", {**BART, "scale_embedding": True}),
    "mt5": ("MT5Config", {**T5, **GATED}),
    "pegasus": ("PegasusConfig", {**BART, "scale_embedding": True, "decoder_start_token_id": 0}),
    "t5gemma": ("T5GemmaConfig", {"encoder": GEMMA, "decoder": GEMMA, "bos_token_id": 1}),
    "umt5": ("UMT5Config", T5),
}


def made(name: str, tiny_t5: Path, place: Path) -> Path:
    """Write a random model of OTHERS to `place`, with the tokenizer of the tiny T5."""
    import torch
    import transformers

    kind, own = OTHERS[name]
    tokens = json.loads((tiny_t5 / "config.json").read_text())
    config = getattr(transformers, kind)(
        **own, **{key: tokens[key] for key in ("vocab_size", "pad_token_id", "eos_token_id")}
    )
    torch.manual_seed(0)
    transformers.AutoModelForSeq2SeqLM.from_config(config).eval().save_pretrained(place)
    transformers.AutoTokenizer.from_pretrained(tiny_t5).save_pretrained(place)
    return place


@pytest.mark.breadth
@pytest.mark.parametrize("name", OTHERS)
def test_other_encoder_decoders_generate_the_same_as_transformers(
    name: str, tiny_t5: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model = made(name, tiny_t5, tmp_path / "model")
    own_adapters = {
        row: make_adapter(model, task="seq2seq-lm", r=rank, seed=rank, scale=0.2)
        for row, rank in (("first", 2), ("second", 4))
    }
    ld.export(model, tmp_path / "bundle", adapters=own_adapters)
    other = ld.TextGenerator(ld.AdapterSession(tmp_path / "bundle"))
    for settings in SETTINGS[:3]:
        answers = other.generate(TEXTS, ROWS, max_new_tokens=10, **settings)
        for text, row, answer in zip(TEXTS, ROWS, answers, strict=True):
            adapter = None if row is None else own_adapters[row]
            assert list(answer.token_ids) == expected(model, adapter, text, **settings)
    of_rows = {
        tuple(answer.token_ids for answer in other.generate(TEXTS, row, max_new_tokens=10))
        for row in ROWS
    }
    assert len(of_rows) == 3, "each adapter's effect is seen"


def test_generation_config_has_the_same_effect_as_in_transformers(
    bundle: Path, tiny_t5: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    own = {"forced_bos_token_id": 17, "forced_eos_token_id": 2, "min_length": 6}
    plain = ld.TextGenerator(ld.AdapterSession(bundle)).generate(TEXTS[0], max_new_tokens=10)[0]
    own["bad_words_ids"] = [[plain.token_ids[0]], list(plain.token_ids[1:3])]
    model, copy = tmp_path / "model", tmp_path / "bundle"
    shutil.copytree(tiny_t5, model)
    shutil.copytree(bundle, copy)
    for place in (model, copy):
        file = place / "generation_config.json"
        values = json.loads(file.read_text())
        file.write_text(json.dumps({**values, **own}))
    for settings in ({}, {"num_beams": 3}):
        answer = ld.TextGenerator(ld.AdapterSession(copy)).generate(
            TEXTS[0], "first", max_new_tokens=10, **settings
        )[0]
        assert list(answer.token_ids) == expected(model, adapters["first"], TEXTS[0], **settings)
        assert answer.token_ids[0] == 17


def test_an_encoder_decoder_is_not_served(bundle: Path) -> None:
    pytest.importorskip("fastapi")
    from loradeploy.serve.service import Service
    from loradeploy.serve.settings import ServeLimits

    with pytest.raises(UsageError, match="a bundle for seq2seq-lm is not served"):
        Service(ld.AdapterSession(bundle), limits=ServeLimits())


def test_encoder_and_decoder_graphs_equal_the_model_with_every_form_of_an_adapter(
    bundle: Path, tiny_t5: Path, adapters: dict[str, Path]
) -> None:
    import peft
    import torch
    import transformers

    allowed = tolerance("torch-onnx-tiny")
    random = np.random.default_rng(3)
    ids, target = random.integers(5, 400, (3, 7)), random.integers(5, 400, (3, 6))
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    feeds = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": target}
    tensors = {name: torch.from_numpy(values) for name, values in feeds.items()}
    answers = {}
    for name in ROWS:
        model: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)
        if name is not None:
            model = peft.PeftModel.from_pretrained(model, adapters[name])
        with torch.no_grad():
            answers[name] = model.eval()(**tensors).logits.numpy()
    session = ld.AdapterSession(bundle)
    (mixed,) = session.run(["logits"], feeds, ROWS)
    for row, name in enumerate(ROWS):
        assert np.abs(mixed[row] - answers[name][row]).max() <= allowed
        assert name is None or np.abs(mixed[row] - answers[None][row]).max() > 0.1

    # The same in two steps with caches, in plain onnxruntime with a native adapter.
    adapter, active = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(bundle / "adapters" / "first.onnx_adapter"))
    active.add_active_adapter(adapter)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    encoder = onnxruntime.InferenceSession(bundle / "encoder.onnx", options)
    decoder = onnxruntime.InferenceSession(bundle / "model.onnx", options)
    names = [node.name for node in encoder.get_outputs()]
    source = encoder.run(names, {"input_ids": ids, "attention_mask": mask}, active)
    fed: dict[str, Any] = {
        name.replace("present", "past_key_values"): values
        for name, values in zip(names, source, strict=True)
    }
    fed |= {
        node.name: np.zeros((3, node.shape[1], 0, node.shape[3]), np.float32)
        for node in decoder.get_inputs()
        if ".decoder." in node.name
    }
    presents = [node.name for node in decoder.get_outputs() if node.name != "logits"]
    found = []
    for part in (target[:, :4], target[:, 4:]):
        logits, *cache = decoder.run(
            ["logits", *presents],
            {**fed, "decoder_input_ids": part, "encoder_attention_mask": mask},
            active,
        )
        found.append(logits)
        fed |= {
            name.replace("present", "past_key_values"): values
            for name, values in zip(presents, cache, strict=True)
        }
    assert np.abs(np.concatenate(found, axis=1) - answers["first"]).max() <= allowed


def test_both_graphs_read_one_set_of_weights_and_one_adapter(bundle: Path, tiny_t5: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.encoder is not None
    assert {file.name for file in bundle.glob("*.onnx*")} == {
        "encoder.onnx",
        "model.onnx",
        "model.onnx.data",
    }
    weights = (tiny_t5 / "model.safetensors").stat().st_size
    # The embedding, a third of the weights, is used by both graphs.
    assert (bundle / "model.onnx.data").stat().st_size < 1.1 * weights
    modules = {target.module for target in manifest.targets}
    assert "encoder.block.0.layer.0.SelfAttention.q" in modules
    assert "decoder.block.0.layer.1.EncDecAttention.k" in modules


def test_both_graphs_can_map_the_weights(bundle: Path, generator: ld.TextGenerator) -> None:
    with ld.AdapterSession(bundle, map_weights=True) as session:
        mapped = ld.TextGenerator(session).generate(TEXTS, ROWS, max_new_tokens=10)
    assert mapped == generator.generate(TEXTS, ROWS, max_new_tokens=10)


def test_a_merged_bundle_and_the_command_give_the_adapters_text(
    bundle: Path, adapters: dict[str, Path], generator: ld.TextGenerator, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    ld.export(bundle, merged, adapters={"first": adapters["first"]}, merge=True)
    answer = generator.generate(TEXTS[1], "first", max_new_tokens=8, num_beams=2)[0]
    given = call("run", merged, TEXTS[1], "--max-new-tokens", "8", "--num-beams", "2", "--json")
    assert tuple(json.loads(given)["token_ids"]) == answer.token_ids
    asked = ("--adapter", "first", "--max-new-tokens", "8", "--num-beams", "2", "--json")
    from_side_inputs = json.loads(call("run", bundle, TEXTS[1], *asked))
    assert (from_side_inputs["text"], from_side_inputs["adapter"]) == (answer.text, "first")
    again = tmp_path / "again"
    ld.export(bundle, again, adapters={"first": adapters["first"]}, merge=True)
    for name in ("encoder.onnx", "model.onnx", "model.onnx.data"):
        assert (again / name).read_bytes() == (merged / name).read_bytes(), "same bytes"


def test_unsupported_uses_are_refused_in_one_line(
    bundle: Path, generator: ld.TextGenerator, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="whose texts have a source"):
        generator.score(TEXTS)
    with pytest.raises(UsageError, match="is empty"):
        generator.generate("", None)
    with pytest.raises(UsageError, match="decoder_input_ids"):
        Engine(generator)
    for option in ({"branches": True}, {"required_inputs": True}, {"operator": True}):
        with pytest.raises(UsageError, match="encoder-decoders, which are two graphs"):
            ld.export(bundle, tmp_path / "out", **option)
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    content = bytearray((broken / "encoder.onnx").read_bytes())
    content[-1] ^= 1
    (broken / "encoder.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"encoder.onnx does not fit"):
        ld.AdapterSession(broken)
    (broken / "encoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"has no encoder.onnx"):
        ld.AdapterSession(broken)


def test_parity_scores_an_adapter_with_its_own_generation_settings(
    bundle: Path, tiny_t5: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    import transformers

    from loradeploy.adapter import load_adapter
    from loradeploy.lora.inject import adapted
    from loradeploy.parity.score.generated import GeneratedTexts, of_session, of_torch
    from loradeploy.parity.score.measures import TRANSLATION
    from loradeploy.train.data.examples import Translation

    data = GeneratedTexts(TRANSLATION, tuple(Translation("", text, text) for text in TEXTS), 8)
    session = ld.AdapterSession(bundle)
    usual = of_session(session, data, "first")
    own = shutil.copytree(adapters["first"], tmp_path / "own")
    settings = json.loads((tiny_t5 / "generation_config.json").read_text())
    frequent = sorted(
        {token for text in usual for token in session.texts.base.tokenizer.encode(text)}
    )
    settings |= {"suppress_tokens": frequent, "decoder_start_token_id": 9}
    (own / "generation_config.json").write_text(json.dumps(settings))
    session.load("own", own)
    found = of_session(session, data, "own")
    assert found != usual, "the settings change the texts"
    model: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).eval()
    with adapted(model, load_adapter(own)):
        assert of_torch(model, data, bundle, own) == found
        assert of_torch(model, data, bundle, adapters["first"]) == usual


def test_a_budget_counts_the_keys_and_values_of_sources(bundle: Path) -> None:
    session = ld.AdapterSession(bundle)
    cross = [spec for spec in session.manifest.inputs if ".encoder." in spec.name]
    each = sum(4 * int(spec.shape[1]) * int(spec.shape[3]) for spec in cross)
    tokens = list(range(3, 43))
    assert cross and session.limits.vocabulary
    # 2 new tokens after 40, as for a decoder, plus the logits of the rows.
    grows = 3 * 42 * row_bytes(session.manifest) + 3 * 42 * session.limits.vocabulary * 4
    settings = {"max_new_tokens": 2, "num_beams": 3}
    enough = ld.TextGenerator(session, cache_budget=grows + 3 * 40 * each)
    assert enough.generate([tokens], **settings)
    with pytest.raises(BudgetError, match="MiB of cache"):
        ld.TextGenerator(session, cache_budget=3 * 40 * each).generate([tokens], **settings)


@pytest.mark.parametrize("name", ["bart", "flan-t5"])
def test_graphs_in_fp16_are_as_near_to_fp32_as_transformers_in_fp16(
    name: str, tiny_t5: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model = made(name, tiny_t5, tmp_path / "model")
    adapter = make_adapter(model, task="seq2seq-lm", r=4, seed=3, scale=0.2)
    ld.export(model, tmp_path / "bundle", adapters={"mine": adapter}, precision="fp16")
    session = ld.AdapterSession(tmp_path / "bundle")
    base, expected = (logits_of(model, which) for which in (None, adapter))
    found = session.run(["logits"], FEEDS, "mine")[0]
    rounding = distance(logits_of(model, adapter, "float16"), expected)
    assert distance(found, expected) <= 2 * rounding < 0.1 * distance(base, expected)


@pytest.mark.breadth
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["bart", "flan-t5"])
def test_graphs_compute_what_pytorch_computes_with_the_same_rounding(
    name: str, precision: str, tiny_t5: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    import torch
    import transformers

    from loradeploy.export.passes.precision.quantize import rounded

    model = made(name, tiny_t5, tmp_path / "model")
    adapter = make_adapter(model, task="seq2seq-lm", r=4, seed=3, scale=0.2)
    ld.export(model, tmp_path / "bundle", adapters={"mine": adapter}, precision=precision)
    found = ld.AdapterSession(tmp_path / "bundle").run(["logits"], FEEDS, "mine")[0]

    narrow: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(model)
    for module, layer in narrow.named_modules():
        if precision == "bf16":
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16().float()
        elif isinstance(layer, torch.nn.Linear):
            bits = 8 if module == "lm_head" else int(precision.removeprefix("int"))
            weight = rounded(layer.weight.detach().numpy(), bits)
            layer.weight = torch.nn.Parameter(torch.from_numpy(weight))  # it may be tied
    narrow.save_pretrained(tmp_path / "narrow")
    # The kernel of a quantized product also rounds its inputs, in blocks.
    block = None if precision == "bf16" else 32
    same = logits_of(tmp_path / "narrow", adapter, block=block)
    exact, base = (logits_of(model, which) for which in (adapter, None))
    assert distance(found, same) <= 0.01 * distance(same, exact)
    assert distance(same, exact) < distance(same, base), "the adapter's effect is seen"


def test_the_scales_of_dora_on_a_product_in_fp32_of_an_fp16_graph_are_cast(
    tiny_t5: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(
        tiny_t5, task="seq2seq-lm", r=4, scale=0.2, use_dora=True, target_modules=["q", "wo"]
    )
    ld.export(tiny_t5, tmp_path / "bundle", adapters={"mine": adapter}, precision="fp16")
    session = ld.AdapterSession(tmp_path / "bundle")
    base, expected = (logits_of(tiny_t5, which) for which in (None, adapter))
    found = session.run(["logits"], FEEDS, "mine")[0]
    assert distance(found, expected) <= tolerance("export-fp16") < 0.1 * distance(base, expected)


@pytest.mark.parametrize("merge", [False, True], ids=["side inputs", "merged"])
def test_products_of_t5_that_overflow_in_fp16_stay_in_fp32(
    merge: bool, tiny_t5: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    import onnx_ir as ir
    import torch
    import transformers

    model: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).eval()
    with torch.no_grad():
        model.encoder.block[0].layer[-1].DenseReluDense.wo.weight *= 8000
    large = tmp_path / "large"
    model.save_pretrained(large)
    transformers.AutoTokenizer.from_pretrained(tiny_t5).save_pretrained(large)
    adapter = make_adapter(large, task="seq2seq-lm", r=2, scale=0.2)
    bundle = tmp_path / "bundle"
    ld.export(large, bundle, adapters={"mine": adapter}, precision="fp16", merge=merge)
    weights = ir.load(bundle / "encoder.onnx").graph.initializers
    wide = [
        n for n, v in weights.items() if v.dtype is ir.DataType.FLOAT and len(v.shape or ()) == 2
    ]
    assert len(wide) == 1, "transformers keeps wo in fp32"

    largest = []
    wo = model.encoder.block[0].layer[-1].DenseReluDense.wo
    wo.register_forward_hook(lambda _, __, y: largest.append(float(y.abs().max())))
    with torch.no_grad():
        model(**{name: torch.from_numpy(values) for name, values in FEEDS.items()})
    assert largest[0] > 65504, "fp16 ends there"
    base, expected = (logits_of(large, which) for which in (None, adapter))
    found = ld.AdapterSession(bundle).run(["logits"], FEEDS, None if merge else "mine")[0]
    allowed = tolerance("export-fp16")  # a merge also rounds the sum of weight and update
    assert distance(found, expected) <= allowed < 0.1 * distance(base, expected)


IDS = np.random.default_rng(3).integers(5, 400, (2, 7))
FEEDS = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "decoder_input_ids": IDS[:, :5]}


def logits_of(
    model: Path, adapter: Path | None, dtype: str = "float32", *, block: int | None = None
) -> NDArray[Any]:
    """Return the logits of transformers and PEFT for FEEDS.

    `block`: round the inputs of the base's linear layers to 8 bits, in blocks of this size.
    """
    import peft
    import torch
    import transformers

    from loradeploy.parity.reference.rounding import round_to_8_bits

    auto: Any = transformers.AutoModelForSeq2SeqLM
    module = auto.from_pretrained(model, dtype=getattr(torch, dtype))
    if adapter is not None:
        module = peft.PeftModel.from_pretrained(module, adapter)
    if block is not None:
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.Linear) and ".lora_" not in name:
                layer.register_forward_pre_hook(
                    lambda _, inputs: (round_to_8_bits(inputs[0], block), *inputs[1:])
                )
    with torch.no_grad():
        tensors = {name: torch.from_numpy(values) for name, values in FEEDS.items()}
        logits: NDArray[Any] = module.eval()(**tensors).logits.float().numpy()
    return logits


def distance(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Return 1 − cosine."""
    a, b = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    return 1 - float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
