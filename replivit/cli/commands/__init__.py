"""One module per command; each has `register(app)`. Keep heavy imports inside functions."""
