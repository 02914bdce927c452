"""Fine-grained manifold distillation (Hao et al., NeurIPS 2022)."""
