"""The mathematics of low-rank adaptation: tensors in, tensors out."""
