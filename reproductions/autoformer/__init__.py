"""AutoFormer: Searching Transformers for Visual Recognition (ICCV 2021)."""
