"""LoRA (Hu et al., 2021, arXiv:2106.09685): each layer is the paper's equation."""
