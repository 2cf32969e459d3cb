"""The program `ddpm`: a command parses its arguments, makes one call of the library, and prints where the result is."""
