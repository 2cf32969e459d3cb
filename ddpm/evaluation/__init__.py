"""How good images are, in numbers that say how sure they are."""
