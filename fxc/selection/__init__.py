"""fxc search: which compression for which layers, under budgets."""
