"""loradeploy: train LoRA adapters, deploy them on ONNX Runtime, and verify the results.

train    data and a base model → an adapter                    (needs the extra `train`)
export   a base model → a bundle, merged or with side inputs   (needs the extra `export`)
parity   a bundle against PyTorch, and the verdict             (needs both)
compare  any two models against each other
AdapterSession, TextGenerator, Engine, TextClassifier,         the runtime; numpy and
TextPairScorer, TokenClassifier, TextEmbedder,                 onnxruntime are all it needs
SpeechRecognizer, ImageClassifier, ImageEmbedder
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Functions that share their package's name. They are bound here, after the packages, so that
# `loradeploy.train` is the function; what they need is imported when they are called.
from loradeploy.errors import (
    AdapterError,
    AdapterMismatchError,
    AdapterStoreError,
    BudgetError,
    BundleError,
    DataError,
    DeadlineError,
    DeviceError,
    EngineClosedError,
    EngineError,
    EngineFullError,
    ExportError,
    LoraDeployError,
    MissingDependencyError,
    ModelError,
    OperatorError,
    OutputError,
    RunError,
    TrainingError,
    TrainingInterruptedError,
    UnknownAdapterError,
    UsageError,
)
from loradeploy.export.api import export
from loradeploy.parity.api import parity
from loradeploy.parity.assertion import assert_parity
from loradeploy.train.api import train

# `loradeploy.parity` is the function or the package, depending on import order; both have
# assert_parity.
vars(parity)["assert_parity"] = assert_parity

if TYPE_CHECKING:
    from loradeploy.adapter import Adapter, AdapterConfig, load_adapter, save_adapter
    from loradeploy.adapter.algebra.combine import combine
    from loradeploy.adapter.algebra.reduce import reduce_rank
    from loradeploy.bundle.graph_form import GraphForm
    from loradeploy.bundle.manifest import Manifest
    from loradeploy.bundle.proof.requirement import CertificateMinimum
    from loradeploy.parity.compare.api import compare
    from loradeploy.parity.figures.tolerances import Limit
    from loradeploy.parity.report.results import ParityReport
    from loradeploy.runtime.decoding.choosing.logprobs import TokenLogprob
    from loradeploy.runtime.decoding.choosing.options import GenerationOptions
    from loradeploy.runtime.decoding.scoring import TextScore
    from loradeploy.runtime.engine.engine import Engine
    from loradeploy.runtime.engine.statistics import EngineStatistics
    from loradeploy.runtime.engine.submission import Completion, GenerationEvent, Submission, Usage
    from loradeploy.runtime.session import AdapterSession
    from loradeploy.runtime.tasks.classification import Classification, TextClassifier
    from loradeploy.runtime.tasks.embedding import TextEmbedder
    from loradeploy.runtime.tasks.entities import Entity
    from loradeploy.runtime.tasks.generation import Generation, TextGenerator
    from loradeploy.runtime.tasks.image_text import ImageTextGenerator
    from loradeploy.runtime.tasks.images import ImageClassifier, ImageEmbedder
    from loradeploy.runtime.tasks.pairs import RankedDocument, TextPairScorer
    from loradeploy.runtime.tasks.speech import Segment, SpeechRecognizer, Transcript
    from loradeploy.runtime.tasks.streaming import TextPiece
    from loradeploy.runtime.tasks.tokens import TokenClassification, TokenClassifier
    from loradeploy.train.config import TrainConfig
    from loradeploy.train.result import TrainResult

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "AdapterMismatchError",
    "AdapterSession",
    "AdapterStoreError",
    "BudgetError",
    "BundleError",
    "CertificateMinimum",
    "Classification",
    "Completion",
    "DataError",
    "DeadlineError",
    "DeviceError",
    "Engine",
    "EngineClosedError",
    "EngineError",
    "EngineFullError",
    "EngineStatistics",
    "Entity",
    "ExportError",
    "Generation",
    "GenerationEvent",
    "GenerationOptions",
    "GraphForm",
    "ImageClassifier",
    "ImageEmbedder",
    "ImageTextGenerator",
    "Limit",
    "LoraDeployError",
    "Manifest",
    "MissingDependencyError",
    "ModelError",
    "OperatorError",
    "OutputError",
    "ParityReport",
    "RankedDocument",
    "RunError",
    "Segment",
    "SpeechRecognizer",
    "Submission",
    "TextClassifier",
    "TextEmbedder",
    "TextGenerator",
    "TextPairScorer",
    "TextPiece",
    "TextScore",
    "TokenClassification",
    "TokenClassifier",
    "TokenLogprob",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "TrainingInterruptedError",
    "Transcript",
    "UnknownAdapterError",
    "Usage",
    "UsageError",
    "assert_parity",
    "build_operator",
    "combine",
    "compare",
    "export",
    "load_adapter",
    "parity",
    "reduce_rank",
    "save_adapter",
    "train",
]

_LAZY = {
    "CertificateMinimum": "loradeploy.bundle.proof.requirement",
    "GraphForm": "loradeploy.bundle.graph_form",
    "Manifest": "loradeploy.bundle.manifest",
    "Limit": "loradeploy.parity.figures.tolerances",
    "ParityReport": "loradeploy.parity.report.results",
    "Generation": "loradeploy.runtime.tasks.generation",
    "GenerationOptions": "loradeploy.runtime.decoding.choosing.options",
    "TextPiece": "loradeploy.runtime.tasks.streaming",
    "TextScore": "loradeploy.runtime.decoding.scoring",
    "TokenLogprob": "loradeploy.runtime.decoding.choosing.logprobs",
    "TrainConfig": "loradeploy.train.config",
    "TrainResult": "loradeploy.train.result",
    "Adapter": "loradeploy.adapter",
    "AdapterConfig": "loradeploy.adapter",
    "combine": "loradeploy.adapter.algebra.combine",
    "compare": "loradeploy.parity.compare.api",
    "load_adapter": "loradeploy.adapter",
    "reduce_rank": "loradeploy.adapter.algebra.reduce",
    "save_adapter": "loradeploy.adapter",
    "AdapterSession": "loradeploy.runtime.session",
    "build_operator": "loradeploy.runtime.operator.build",
    "Completion": "loradeploy.runtime.engine.submission",
    "Engine": "loradeploy.runtime.engine.engine",
    "EngineStatistics": "loradeploy.runtime.engine.statistics",
    "GenerationEvent": "loradeploy.runtime.engine.submission",
    "Submission": "loradeploy.runtime.engine.submission",
    "Usage": "loradeploy.runtime.engine.submission",
    "TextClassifier": "loradeploy.runtime.tasks.classification",
    "TextEmbedder": "loradeploy.runtime.tasks.embedding",
    "TextGenerator": "loradeploy.runtime.tasks.generation",
    "ImageClassifier": "loradeploy.runtime.tasks.images",
    "ImageTextGenerator": "loradeploy.runtime.tasks.image_text",
    "ImageEmbedder": "loradeploy.runtime.tasks.images",
    "RankedDocument": "loradeploy.runtime.tasks.pairs",
    "TextPairScorer": "loradeploy.runtime.tasks.pairs",
    "Segment": "loradeploy.runtime.tasks.speech",
    "SpeechRecognizer": "loradeploy.runtime.tasks.speech",
    "Transcript": "loradeploy.runtime.tasks.speech",
    "Classification": "loradeploy.runtime.tasks.classification",
    "Entity": "loradeploy.runtime.tasks.entities",
    "TokenClassification": "loradeploy.runtime.tasks.tokens",
    "TokenClassifier": "loradeploy.runtime.tasks.tokens",
}


def __getattr__(name: str) -> Any:
    # Importing numpy and onnxruntime takes 0.3 s, too long for `loradeploy --help`.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
