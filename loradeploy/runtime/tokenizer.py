"""Public names of `Tokenizer` and `PieceDecoder`."""

from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.runtime.text.pieces import PieceDecoder

__all__ = ["PieceDecoder", "Tokenizer"]
