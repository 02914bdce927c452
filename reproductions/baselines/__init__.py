"""Reference rows of the leaderboard: models from timm, and the small ViT of the small tracks."""
