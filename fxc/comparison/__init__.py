"""fxc compare: what each of several strategies makes of a model, in one table."""
