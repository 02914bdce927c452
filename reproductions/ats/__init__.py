"""ATS: adaptive token sampling, a number of tokens that depends on the image."""
