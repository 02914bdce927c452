"""EfficientFormerV2: MobileNet-sized and MobileNet-fast vision transformers."""
