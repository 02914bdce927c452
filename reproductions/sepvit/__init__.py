"""SepViT: separable vision transformer (Li et al., arXiv 2203.15380)."""
