"""Train, balance and merge multi-task models in JAX with optax transforms."""
