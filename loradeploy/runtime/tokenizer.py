"""`Tokenizer` and `PieceDecoder` under their public names; they lie with what else is of texts."""

from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.runtime.text.pieces import PieceDecoder

__all__ = ["PieceDecoder", "Tokenizer"]
