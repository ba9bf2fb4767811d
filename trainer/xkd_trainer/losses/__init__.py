"""The losses as pure functions, one paper to a module; each returns a `LossTerm` of a sum and a count."""
