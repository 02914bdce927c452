"""DynamicViT: prediction heads that throw away the least useful tokens, stage by stage."""
