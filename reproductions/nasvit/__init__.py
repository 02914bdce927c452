"""NASViT: Neural Architecture Search for Efficient Vision Transformers with Gradient
Conflict-Aware Supernet Training (ICLR 2022)."""
