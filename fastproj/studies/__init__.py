"""A study: arms x seeds x sets, what its runs say together, and its table."""
