"""Neural architecture search: space, cost, supernet, search."""
