"""ViT-Slim: learn soft masks, rank them once, and cut a vision transformer to any budget."""
