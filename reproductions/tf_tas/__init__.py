"""TF-TAS: training-free transformer architecture search with the DSS-indicator."""
