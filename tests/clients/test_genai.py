"""onnxruntime-genai opens the same bundle and generates the same tokens with its adapters."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.conftest import ROOT, MakeAdapter

GENAI = ROOT / ".venv-genai" / "bin" / "python"
PROMPT = [5, 17, 42, 99, 7]
COUNT = 12


@pytest.mark.skipif(not GENAI.exists(), reason="make setup makes .venv-genai")
@pytest.mark.parametrize(
    ("layout", "branches", "attention"),
    [
        ("slots", False, "standard"),
        ("slots", True, "standard"),
        ("rows", False, "standard"),
        ("rows", True, "standard"),
        ("rows", False, "gqa"),  # with one buffer for past and present
    ],
)
def test_genai_generates_the_same_as_the_runtime(
    layout: str,
    branches: bool,
    attention: str,
    tiny_llama: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    base = tiny_llama
    adapter = make_adapter(base, r=4, seed=5, scale=0.3, rank_pattern={"q_proj": 2})
    form = {"layout": layout, "branches": branches, "attention": attention}
    export(base, tmp_path / "bundle", adapters={"mine": adapter}, **form)  # type: ignore[arg-type]
    config = json.loads((tmp_path / "bundle" / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is (attention == "gqa")
    native = tmp_path / "bundle" / "adapters" / "mine.onnx_adapter"
    client = Path(__file__).with_name("genai_client.py")
    done = subprocess.run(
        [GENAI, client, tmp_path / "bundle", native, str(COUNT), *map(str, PROMPT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])

    generator = TextGenerator(AdapterSession(tmp_path / "bundle"))
    ours = [
        list(result.token_ids)
        for result in generator.generate([PROMPT, PROMPT], [None, "mine"], max_new_tokens=COUNT)
    ]
    assert theirs["base"][: len(ours[0])] == ours[0]
    assert theirs["adapter"][: len(ours[1])] == ours[1]
    assert theirs["base"] != theirs["adapter"], "the adapter did nothing"
