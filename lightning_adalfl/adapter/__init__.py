"""What stands between Lightning and the hypergradient: the meta-learner, its data, and the checks."""
