"""Reformer: LSH attention and reversible layers (Kitaev et al., arXiv 2001.04451)."""
