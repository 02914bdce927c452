"""UniNet (Liu et al., ECCV 2022): one search over convolution, attention, MLP and down-sampling."""
