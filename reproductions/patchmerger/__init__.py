"""PatchMerger: learned queries merge all tokens of a vision transformer into a few."""
