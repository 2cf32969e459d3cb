"""Other projects' contestants, each used as its documentation advises."""
