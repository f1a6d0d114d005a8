"""Many clients and adapters on a bundle, and on other engines (see __main__)."""
