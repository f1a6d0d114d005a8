"""The fuzzed readers: each mutates a valid file in a scratch directory, and reads it as users do.

A try passes if it succeeds or raises a `LoraDeployError` with a one-line message.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np

from loradeploy.adapter.files.tensors import write_arrays
from loradeploy.errors import BundleError, LoraDeployError
from loradeploy.files import read_json, write_json
from tools.fuzzing import mutate
from tools.fuzzing.odd import (
    ADAPTERS,
    ODD_OPTIONS,
    OPTIONS,
    PROMPTS,
    other_feed,
    patterns,
    template,
)

_LONGEST: Final = 1000  # characters of a message: paths and names may be long


@dataclass(frozen=True)
class Seeds:
    """Valid files: an adapter, a bundle that it fits, an ONNX file of an encoder."""

    adapter: Path
    bundle: Path
    native: Path
    graph: Path


@dataclass(frozen=True)
class Finding:
    """A try that failed: its reader and index, the mutation, and how it ended."""

    reader: str
    index: int
    what: str
    ended: str


class Reader:
    """Reads mutated copies of the files in `seeds`, in the directory `scratch`."""

    def __init__(self, seeds: Seeds, scratch: Path) -> None:
        self.seeds = seeds
        self.scratch = scratch
        self.what = ""

    def attempt(self, random: Random) -> None:
        """Make one try."""
        raise NotImplementedError

    def spoil(self, file: Path, random: Random, how: Callable[[Random, bytes], bytes]) -> None:
        """Replace `file` by a mutated copy; hard links to it are not affected."""
        self.what = f"{how.__name__} of {file.name}"
        content = how(random, file.read_bytes())
        file.unlink()
        file.write_bytes(content)

    def inspect(self, path: Path) -> None:
        """Run `loradeploy inspect` on `path`."""
        from loradeploy.cli.main import commands

        with contextlib.redirect_stdout(io.StringIO()):
            commands.main(["inspect", str(path)], standalone_mode=False)


class AdapterReader(Reader):
    """PEFT directories: the config and the safetensors file."""

    def attempt(self, random: Random) -> None:
        from loradeploy.adapter import load_adapter, match_targets, save_adapter
        from loradeploy.bundle.adapter_inputs.base import BundleBase
        from loradeploy.bundle.adapter_inputs.factors import side_inputs
        from loradeploy.bundle.manifest import read_manifest

        place = self._copy()
        kind = random.randrange(5)
        if kind < 2:
            self.spoil(place / "adapter_config.json", random, mutate.in_json)
        elif kind == 2:
            self.spoil(place / "adapter_config.json", random, patterns)
        else:
            self.spoil(place / "adapter_model.safetensors", random, mutate.in_safetensors)
        if random.randrange(10) == 0:
            self.inspect(place)
        adapter = load_adapter(place)
        manifest = read_manifest(self.seeds.bundle)
        match_targets((t.module for t in manifest.targets), adapter.config)
        save_adapter(adapter, self.scratch / "again")
        side_inputs(adapter, manifest, BundleBase(self.seeds.bundle, manifest))

    def _copy(self) -> Path:
        place = self.scratch / "adapter"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(self.seeds.adapter / name, place / name)
        return place


class NativeReader(Reader):
    """.onnx_adapter files."""

    def attempt(self, random: Random) -> None:
        from loradeploy.bundle.adapter_inputs.base import BundleBase
        from loradeploy.bundle.adapter_inputs.factors import adapter_from_side_inputs
        from loradeploy.bundle.adapter_inputs.native import read_onnx_adapter
        from loradeploy.bundle.manifest import read_manifest

        file = self.scratch / "broken.onnx_adapter"
        shutil.copyfile(self.seeds.native, file)
        self.spoil(file, random, mutate.in_bytes)
        manifest = read_manifest(self.seeds.bundle)
        arrays = read_onnx_adapter(file)
        adapter_from_side_inputs(arrays, manifest, BundleBase(self.seeds.bundle, manifest))


class _InBundle(Reader):
    """A reader of copies of the bundle."""

    def bundle(self) -> Path:
        """Return a new copy of the bundle."""
        place = self.scratch / "bundle"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.seeds.bundle, place)
        return place


class BundleReader(_InBundle):
    """The manifest, the graph, its data, the certificate, and the configs of a bundle."""

    _JSON: Final = (
        *("loradeploy.json",) * 6,
        "config.json",
        "generation_config.json",
        "parity.json",
    )

    def attempt(self, random: Random) -> None:
        import loradeploy as ld

        place = self.bundle()
        kind = random.randrange(10)
        names = [name for name in self._JSON if (place / name).is_file()]
        if kind < 8:
            self.spoil(place / random.choice(names), random, mutate.in_json)
        elif kind == 8:
            self.spoil(place / "model.onnx", random, mutate.in_bytes)
        else:
            self.spoil(place / "model.onnx.data", random, mutate.in_bytes)
        if random.randrange(10) == 0:
            self.inspect(place)
        certified = (place / "parity.json").is_file() and random.randrange(3) == 0
        session = ld.AdapterSession(place, require_certificate=certified)
        name = next(iter(session.manifest.adapters), None)
        ld.TextGenerator(session).generate(["hi", "abc"], name, max_new_tokens=1)


class TokenizerReader(Reader):
    """tokenizer.json, the files that belong to it, and chat templates."""

    _NAMES: Final = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "config.json")

    def attempt(self, random: Random) -> None:
        from loradeploy.bundle.text.tokenizer import Tokenizer

        place = self.scratch / "tokenizer"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for name in (*self._NAMES, "generation_config.json", "chat_template.jinja"):
            if (self.seeds.bundle / name).is_file():
                shutil.copyfile(self.seeds.bundle / name, place / name)
        if random.randrange(3):
            self.spoil(place / random.choice(self._NAMES), random, mutate.in_json)
        else:
            self.what = source = template(random)
            (place / "chat_template.jinja").write_text(source, encoding="utf-8")
        tokenizer = Tokenizer(place)
        tokenizer.decode(tokenizer.encode("Hello, wörld! <|im_end|>", max_length=7))
        if tokenizer.template is not None:
            messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "."}]
            tokenizer.encode_chat(messages)
        Tokenizer(place, Tokenizer(self.seeds.bundle))


class RecipeReader(Reader):
    """modules.json of sentence-transformers and its files, and the labels of classifiers."""

    def attempt(self, random: Random) -> None:
        from loradeploy.adapter.heads import config_labels, stated_problem
        from loradeploy.bundle.text.vectors.recipe import read_recipe

        place = self.scratch / "recipe"
        shutil.rmtree(place, ignore_errors=True)
        make_recipe(place)
        file = random.choice(sorted(path for path in place.rglob("*") if path.is_file()))
        broken = mutate.in_json if file.suffix == ".json" else mutate.in_safetensors
        self.spoil(file, random, broken)
        config = read_json(place / "config.json", error=BundleError)
        config_labels(config, "config.json", error=BundleError)
        stated_problem(config, "config.json", error=BundleError)
        recipe = read_recipe(place)
        if recipe is not None:
            recipe.vectors(np.ones((2, 3, 8), np.float32), np.ones((2, 3), np.int64), 1)


class GraphReader(Reader):
    """ONNX files of other exporters, exported with side inputs."""

    def attempt(self, random: Random) -> None:
        from loradeploy.export.api import export

        file = self.scratch / "graph" / "model.onnx"
        shutil.rmtree(file.parent, ignore_errors=True)
        shutil.rmtree(self.scratch / "out", ignore_errors=True)
        file.parent.mkdir()
        shutil.copyfile(self.seeds.graph, file)
        self.spoil(file, random, mutate.in_onnx)
        if random.randrange(10) == 0:
            self.inspect(file)
        export(file, self.scratch / "out", task="feature-extraction")


class FeedsReader(Reader):
    """The feeds of a session, and the arguments of a generator."""

    def __init__(self, seeds: Seeds, scratch: Path) -> None:
        import loradeploy as ld

        super().__init__(seeds, scratch)
        self._session = ld.AdapterSession(seeds.bundle)
        self._session.load("own", seeds.adapter)
        self._generator = ld.TextGenerator(self._session)

    def attempt(self, random: Random) -> None:
        if random.randrange(3) == 0:
            options = {
                name: self._option(random, name) for name in OPTIONS if random.randrange(3) == 0
            }
            prompts = random.choice(PROMPTS)
            self.what = f"generate({prompts!r:.80}, {options!r:.200})"
            self._generator.generate(prompts, **{"max_new_tokens": 1, **options})
            return
        from loradeploy.runtime.timing import sample_feeds

        rows = random.choice((1, 2))
        feeds: dict[str, Any] = dict(
            sample_feeds(self._session, rows, past=random.choice((0, 2)), new=3)
        )
        changed: set[str] = set()
        for _ in range(random.choice((0, 1, 1, 2))):
            name = random.choice(list(feeds))
            with np.errstate(all="ignore"):
                feeds[name] = other_feed(random, feeds[name])
            changed.add(name)
        if random.randrange(10) == 0:
            feeds.pop(random.choice(list(feeds)))
        if random.randrange(10) == 0:
            feeds[random.choice(("", "x", "own"))] = np.zeros(1)
        adapters = random.choice((None, "own", ["own"] * rows, [None] * rows, *ADAPTERS))
        outputs: Any = random.choice((None, ["logits"], ["logits"], [], ["x"], "logits", 3, [None]))
        shapes = {n: getattr(v, "shape", v) for n, v in feeds.items() if "past" not in n}
        self.what = f"run({outputs!r}, {shapes!r:.200}, {adapters!r:.80})"
        given = self._session.run(outputs, feeds, adapters)
        # The cache comes from the user, so it may contain anything.
        own = any("past" in name for name in changed)
        if not own and not all(np.isfinite(values).all() for values in given):
            raise AssertionError("the outputs are not finite")

    def _option(self, random: Random, name: str) -> Any:
        return random.choice((*OPTIONS[name], *ODD_OPTIONS))


READERS: Final[Mapping[str, type[Reader]]] = {
    "adapter": AdapterReader,
    "native": NativeReader,
    "bundle": BundleReader,
    "tokenizer": TokenizerReader,
    "recipe": RecipeReader,
    "graph": GraphReader,
    "feeds": FeedsReader,
}


def tries(name: str, seeds: Seeds, scratch: Path, seed: int) -> Iterator[Finding | None]:
    """Yield the results of tries of the reader `name` endlessly: None, or a finding."""
    reader = READERS[name](seeds, scratch)
    index = 0
    while True:
        yield attempt(reader, name, seed, index)
        index += 1


def attempt(reader: Reader, name: str, seed: int, index: int) -> Finding | None:
    """Make the try number `index` of `reader`; it depends on reader, seed and index only."""
    random = Random(f"{seed}/{name}/{index}")
    reader.what = ""
    try:
        with warnings.catch_warnings():
            if name != "graph":  # mutated weights may have any magnitude, and overflow
                warnings.simplefilter("error", RuntimeWarning)
            reader.attempt(random)
    except LoraDeployError as problem:
        said = str(problem)
        if not said or "\n" in said or len(said) > _LONGEST:
            return Finding(name, index, reader.what, f"a message of {len(said)}: {said!r:.300}")
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as problem:  # a Rust library's panic is not an Exception
        return Finding(name, index, reader.what, f"{type(problem).__name__}: {str(problem)[:300]}")
    return None


def make_recipe(place: Path) -> None:
    """Write files of sentence-transformers to `place`: pooling, a dense layer, normalization."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3": "Normalize"}
    package = "sentence_transformers.models."
    for folder in kinds:
        (place / folder).mkdir(parents=True, exist_ok=True)
    modules = [{"path": path, "type": package + kind} for path, kind in kinds.items()]
    write_json(place / "modules.json", modules)
    write_json(place / "config.json", {"id2label": {"0": "no", "1": "yes"}})
    write_json(place / "sentence_bert_config.json", {"max_seq_length": 7, "do_lower_case": True})
    prompts = {"prompts": {"query": "q: "}, "default_prompt_name": "query"}
    write_json(place / "config_sentence_transformers.json", prompts)
    write_json(place / "1_Pooling" / "config.json", {"pooling_mode": ["cls", "mean"]})
    dense = {"in_features": 16, "out_features": 4, "bias": True}
    activation = {"activation_function": "torch.nn.modules.activation.Tanh"}
    write_json(place / "2_Dense" / "config.json", {**dense, **activation})
    weights = {"linear.weight": (4, 16), "linear.bias": (4,)}
    arrays = {name: np.ones(shape, np.float32) for name, shape in weights.items()}
    write_arrays(place / "2_Dense" / "model.safetensors", arrays, {})
