"""What the speed figures come from: ``python -m bench``."""
