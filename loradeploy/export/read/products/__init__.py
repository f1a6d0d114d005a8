"""Rewrite products as other exporters write them: one MatMul or Gemm for each linear layer."""
