"""``python -m bench gpu``: everything that a person with a GPU can find out of these kernels in some minutes."""
