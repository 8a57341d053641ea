"""What the kernels compile to, for chips that are not here."""
